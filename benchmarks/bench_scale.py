"""Expert parallelism at cluster scale, on paper: bytes and layer time from the cost model.

Large models on 8 to 1,024 GPUs and three fabrics. Nothing here ran on a GPU: rows are counted on
routing joined from recordings, and time follows from links' and accelerators' rates. Two checks
say how far that can be trusted: published measurements of DeepEP against the same model, and the
joined routing against a recording of the shape that it was joined to.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.bench_serve_policies import ACCELERATOR
from benchmarks.registry import Chart, Result, Row, Table
from benchmarks.scale_checks import joining_rows, published_rows
from benchmarks.scale_cost import Counted, bytes_by_tier, seconds, wire_limit_seconds
from benchmarks.scale_models import FABRICS, GPUS_A_NODE, MODELS, Fabric, ScaledModel
from benchmarks.scale_plan import VARIANTS, counted_variants
from benchmarks.scale_routing import joined_trace
from semantic_ep.errors import ConfigError, explain
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.serve.scheduling.cost import ServingCost

PHASES = {"prefill": 4096, "decode": 128}
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
BASELINE = "contiguous"
# Contiguous placement with rows sent in the same way: what a plan adds to a better transport.
_SAME_SENDING = {
    "routes": "a row a route",
    "ranks": BASELINE,
    "forwarded": "contiguous, forwarded",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the theme's flags."""
    parser.add_argument(
        "--trace", type=Path, nargs=2, required=True, metavar=("NPZ64", "NPZ32"),
        help="recordings of a model with 64 experts and of one with 32, with token ids",
    )  # fmt: skip
    parser.add_argument(
        "--largest-ep", type=int, default=64, metavar="G",
        help="largest EP group; more GPUs run several groups (default: 64)",
    )  # fmt: skip
    parser.add_argument("--layers", type=int, default=1, help="layers counted of each model")
    parser.add_argument("--models", nargs="+", default=[model.name for model in MODELS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="8 GPUs, Mixtral only")


def run(args: argparse.Namespace) -> Result:
    """Count every model at every size of EP group, then put each on every fabric.

    Raises:
        ConfigError: A model is unknown, or the recordings do not have the shapes asked for.
    """
    recordings = _recordings(args.trace)
    rows: list[Row] = []
    for model in _models(args):
        trace = joined_trace(
            recordings[model.recorded], model.router, layers=args.layers, seed=args.seed
        )
        sizes = {_ep_size(model, gpus, args) for gpus in _gpus(args)}
        for ep_size in sorted(sizes):
            counted = counted_variants(trace, FABRICS[0].topology(ep_size), seed=args.seed)
            for fabric in FABRICS:
                rows += _rows(model, fabric, ep_size, counted, args)
    published = published_rows(seed=args.seed)
    joining = joining_rows(recordings[64], recordings[32], seed=args.seed)
    return Result(
        theme="scale",
        protocol=_protocol(args),
        rows=[*rows, *published, *joining],
        tables=[
            *_tables(rows),
            Table(title="DeepEP's published figures against this model", rows=published),
            Table(title="Joined routing against a recording of that shape, EP8", rows=joining),
        ],
        charts=_charts(rows, published),
    )


def _recordings(paths: list[Path]) -> dict[int, RoutingTrace]:
    from semantic_ep.observe.formats import read_npz_trace

    found = {}
    for path, experts in zip(paths, (64, 32), strict=True):
        trace = read_npz_trace(path, num_experts=experts)
        if not (trace.token_id >= 0).any():
            raise ConfigError(
                explain("a schedule needs token ids", where=f"--trace {path}", got="none")
            )
        found[experts] = trace
    return found


def _models(args: argparse.Namespace) -> list[ScaledModel]:
    by_name = {model.name: model for model in MODELS}
    names = ["Mixtral-8x7B"] if args.quick else args.models
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ConfigError(
            explain("unknown model", where="--models", got=unknown[0], allowed=list(by_name))
        )
    return [by_name[name] for name in names]


def _gpus(args: argparse.Namespace) -> tuple[int, ...]:
    return GPUS[:1] if args.quick else GPUS


def _ep_size(model: ScaledModel, gpus: int, args: argparse.Namespace) -> int:
    return min(gpus, model.router.num_experts, args.largest_ep)


def _rows(
    model: ScaledModel,
    fabric: Fabric,
    ep_size: int,
    counted: dict[str, Counted],
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Rows of every number of GPUs that runs EP groups of this size."""
    topology = fabric.topology(ep_size)
    cost = ServingCost(model=model.size(), accelerator=ACCELERATOR, topology=topology)
    for phase, tokens in PHASES.items():
        times: dict[str, tuple[float, float]] = {}
        for variant, (name, sending) in VARIANTS.items():
            if name not in counted:
                continue
            wire = seconds(
                counted[name], topology, sending=sending, tokens=tokens, row_bytes=model.row_bytes
            )
            load = float(counted[name].cost.load_max_over_mean.mean())
            activations = tokens * model.router.top_k * load
            experts = max(activations * cost.seconds_per_activation, cost.expert_weight_seconds)
            times[variant] = (wire, wire + experts)
        limit = wire_limit_seconds(
            model.router,
            ep_size,
            tokens=tokens,
            row_bytes=model.row_bytes,
            wire_intra=fabric.wire_intra,
            wire_inter=fabric.wire_inter,
        )
        for gpus in _gpus(args):
            if _ep_size(model, gpus, args) != ep_size:
                continue
            for variant, (wire, layer) in times.items():
                name, sending = VARIANTS[variant]
                inside, between = bytes_by_tier(
                    counted[name], topology, sending=sending, row_bytes=model.row_bytes
                )
                yield {
                    "model": model.name,
                    "fabric": fabric.name,
                    "phase": phase,
                    "gpus": gpus,
                    "ep_size": ep_size,
                    "variant": variant,
                    "lar": float(counted[name].cost.lar.mean()),
                    "remote_copies": float(counted[name].cost.remote_copies.mean()),
                    "node_copies": float(counted[name].cost.node_copies.mean()),
                    "load_max_over_mean": float(counted[name].cost.load_max_over_mean.mean()),
                    "cluster_gbytes_in_nodes": 2 * inside * tokens * gpus / 1e9,
                    "cluster_gbytes_between_nodes": 2 * between * tokens * gpus / 1e9,
                    "all_to_all_us": wire * 1e6,
                    "layer_us": layer * 1e6,
                    "all_to_all_saved": 1 - wire / times[BASELINE][0],
                    "layer_saved": 1 - layer / times[BASELINE][1],
                    "saved_same_sending": 1 - wire / times[_SAME_SENDING[sending]][0],
                    "wire_limit_us": limit * 1e6,
                }


def _protocol(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "on_paper": "no GPU ran: rows are counted, time is predicted",
        "recordings": [path.name for path in args.trace],
        "routing": "layers of a recorded model joined to the wanted experts and top-k, half of "
        "the requests planned on, the other half counted; see benchmarks/scale_routing.py",
        "layers_counted": args.layers,
        "seed": args.seed,
        "phases": {phase: f"{tokens} tokens a rank" for phase, tokens in PHASES.items()},
        "largest_ep": args.largest_ep,
        "groups": "an EP group is the smallest of GPUs, experts and largest_ep; more GPUs run "
        "several groups beside each other",
        "node": f"{GPUS_A_NODE} GPUs",
        "variants": {
            variant: f"{name}; {sending}" for variant, (name, sending) in VARIANTS.items()
        },
        "sending": {
            "routes": "a row for each activation: no de-duplication",
            "ranks": "a row for each distinct rank",
            "forwarded": "a row for each distinct node, forwarded inside it",
        },
        "definitions": {
            "all_to_all_us": "dispatch and combine of one MoE layer, bf16 both ways, slowest rank",
            "layer_us": "that, and the busiest rank's routed experts (compute or reading weights, "
            "whichever is longer); without overlap, attention and shared experts",
            "saved_same_sending": "of the all-to-all, against contiguous sent in the same way",
            "saved": f'against "{BASELINE}" with a row a distinct rank, at the same size',
            "cluster_gbytes": "dispatch and combine of one layer, all GPUs",
            "wire_limit_us": "dispatch and combine of blind routing, a row a distinct rank, at the "
            "links' nominal rates: 450 GB/s NVLink 4, 50 GB/s IB, without latency",
        },
        "fabrics": [dataclasses.asdict(fabric) for fabric in FABRICS],
        "accelerator": dataclasses.asdict(ACCELERATOR),
    }


def _tables(rows: list[Row]) -> Iterator[Table]:
    """One a model and fabric, prefill: the ablation at each size of EP group."""
    for model in dict.fromkeys(row["model"] for row in rows):
        for fabric in dict.fromkeys(row["fabric"] for row in rows):
            here = [
                row
                for row in rows
                if (row["model"], row["fabric"], row["phase"]) == (model, fabric, "prefill")
            ]
            first = {row["ep_size"]: row["gpus"] for row in reversed(here)}
            yield Table(
                title=f"{model}, {fabric}: one layer, prefill ({PHASES['prefill']} tokens a GPU)",
                rows=[
                    {
                        "GPUs": row["gpus"],
                        "variant": row["variant"],
                        "LAR": row["lar"],
                        "remote copies": row["remote_copies"],
                        "node copies": row["node_copies"],
                        "load max/mean": row["load_max_over_mean"],
                        "all-to-all us": row["all_to_all_us"],
                        "layer us": row["layer_us"],
                        "all-to-all saved": f"{row['all_to_all_saved']:+.1%}",
                        "same sending": f"{row['saved_same_sending']:+.1%}",
                        "layer saved": f"{row['layer_saved']:+.1%}",
                        "wire limit us": row["wire_limit_us"],
                    }
                    for row in here
                    if row["gpus"] == first[row["ep_size"]]
                ],
            )


def _charts(rows: list[Row], published: list[Row]) -> list[Chart]:
    charts = []
    shown = ("a row a route", BASELINE, "placement + schedule", "placement + schedule, forwarded")
    for model in dict.fromkeys(row["model"] for row in rows):
        here = [
            row
            for row in rows
            if (row["model"], row["fabric"], row["phase"]) == (model, FABRICS[0].name, "prefill")
        ]
        lines = [row for row in here if row["variant"] in shown]
        base = [row for row in here if row["variant"] == BASELINE]
        for name, share in (("limit: blind, nominal wire rate", 1.0), ("limit at 70 %", 0.7)):
            lines += [
                {**row, "variant": name, "all_to_all_us": row["wire_limit_us"] / share}
                for row in base
            ]
        charts.append(
            Chart(
                title=f"{model}, {FABRICS[0].name}, 4096 tokens a GPU",
                kind="lines",
                rows=lines,
                x="gpus",
                y="all_to_all_us",
                y_label="all-to-all of a layer, us",
                series="variant",
                log=True,
            )
        )
    for fabric in FABRICS:
        largest = {row["model"]: row["ep_size"] for row in rows}
        charts.append(
            Chart(
                title=f"{fabric.name}: share of a layer's time saved, prefill, largest EP group",
                kind="bars",
                rows=[
                    row
                    for row in rows
                    if row["fabric"] == fabric.name
                    and row["phase"] == "prefill"
                    and row["ep_size"] == largest[row["model"]]
                ],
                x="variant",
                y="layer_saved",
                y_label=f"saved, against {BASELINE}",
                series="model",
            )
        )
    charts.append(
        Chart(
            title="Against DeepEP's published figures",
            kind="bars",
            rows=[{**row, "error_percent": 100 * row["error"]} for row in published],
            x="what",
            y="error_percent",
            y_label="error of the prediction, %",
        )
    )
    return charts
