"""Placements and schedules of every method on recorded routing, with one protocol.

Traces (`--trace`): requests are split at random into a profiled and an evaluated part; everything
is planned on the first and counted on all tokens of the second. Loads (`--loads`): a placement with
spare slots is planned on one workload's expert load and weighed on another's.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
import multiprocessing
import pickle
import resource
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

from benchmarks import plan_loads
from benchmarks.registry import Chart, Result, Row, Table
from semantic_ep.errors import ConfigError, explain, nearest

logger = logging.getLogger(__name__)

# Placements that the row "random" is the mean of, over all seeds together.
RANDOM_PLACEMENTS = 20


FIGURES = (
    "lar",
    "remote_copies",
    "node_copies",
    "load_max_over_mean",
    "tokens_max_over_mean",
    "solve_seconds",
    "peak_mb",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A placement policy and how tokens find their home rank.

    Attributes:
        name: Name in rows and on the command line.
        policy: Name of the placement policy.
        mode: "tokens" (equal slices of a batch, anew in each layer) or "requests" (whole).
        scheduled: Whether home ranks follow predicted affinity.
        replicated: Whether spare slots hold copies (`--redundant-slots`).
    """

    name: str
    policy: str
    mode: Literal["tokens", "requests"] = "tokens"
    scheduled: bool = False
    replicated: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the theme's flags."""
    parser.add_argument(
        "--trace", action="append", type=Path, default=[], metavar="NPZ",
        help="routing trace; repeat for several. Without token_id only placements are compared",
    )  # fmt: skip
    parser.add_argument("--ep", type=int, nargs="+", default=[4, 8], metavar="G", help="EP ranks")
    parser.add_argument("--nodes", type=int, default=1, help="nodes that the ranks are spread over")
    parser.add_argument("--profile-fraction", type=float, default=0.2, metavar="F")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="random splits, 0..N-1")
    parser.add_argument(
        "--methods", nargs="+", default=["all"], metavar="M",
        help="method names, or all; an unknown name lists them",
    )  # fmt: skip
    parser.add_argument(
        "--num-experts", type=int, metavar="E",
        help="experts a layer (default: the largest id + 1, rounded up to a multiple of 4)",
    )  # fmt: skip
    parser.add_argument("--time-limit", type=float, metavar="S", help="seconds for a policy")
    parser.add_argument(
        "--jobs", type=int, default=1,
        help="processes; more than one disturbs solve_seconds (default: 1)",
    )  # fmt: skip
    plan_loads.add_arguments(parser)


def run(args: argparse.Namespace) -> Result:
    """Compare on traces, on loads, or on both.

    Raises:
        ConfigError: Neither is given, or a method is unknown.
    """
    if not args.trace and not args.loads:
        raise ConfigError(
            explain("nothing to plan on", where="--trace, --loads", do="Give one or both")
        )
    parts = []
    if args.trace:
        parts.append(_run_traces(args))
    if args.loads:
        parts.append(plan_loads.run(args))
    return Result(
        theme="plan",
        protocol={key: value for part in parts for key, value in part.protocol.items()},
        rows=[row for part in parts for row in part.rows],
        tables=[table for part in parts for table in part.tables],
        charts=[chart for part in parts for chart in part.charts],
    )


def methods() -> dict[str, Method]:
    """All methods by name: each policy as it is meant, and what its parts are worth alone."""
    from semantic_ep.plan.policies import policies

    ours = {"semantic", "semantic-requests"}
    baselines = [Method(name=name, policy=name) for name in policies() if name not in ours]
    rest = [
        # Placements of others under our schedule: what the semantic placement adds to it.
        *(
            Method(name=f"{name}+schedule", policy=name, scheduled=True)
            for name in ("contiguous", "exflow", "grace", "semmoe")
        ),
        Method(name="semantic-placement-only", policy="semantic"),
        Method(name="semantic", policy="semantic", scheduled=True),
        Method(name="semantic+replicas", policy="semantic", scheduled=True, replicated=True),
        Method(name="contiguous-requests", policy="contiguous", mode="requests"),
        Method(
            name="semantic-requests", policy="semantic-requests", mode="requests", scheduled=True
        ),
    ]
    return {method.name: method for method in [*baselines, *rest]}


def chosen_methods(
    names: Sequence[str], *, token_ids: bool, redundant_slots: int = 0
) -> list[Method]:
    """Methods by name; those that need token ids, or spare slots, are left out without them.

    Raises:
        ConfigError: A name is unknown.
    """
    known = methods()
    wanted = list(known) if "all" in names else list(names)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        close = nearest(unknown[0], known)
        raise ConfigError(
            explain(
                "unknown method",
                where="--methods",
                got=unknown[0],
                allowed=["all", *known],
                do=f'Did you mean "{close}"?' if close else None,
            )
        )
    needing = [name for name in wanted if known[name].scheduled or "semantic" in name]
    if needing and not token_ids:
        logger.warning("no token ids in this trace: leaving out %s", ", ".join(needing))
        wanted = [name for name in wanted if name not in needing]
    return [known[name] for name in wanted if redundant_slots or not known[name].replicated]


def _run_traces(args: argparse.Namespace) -> Result:
    from semantic_ep.observe.formats import read_npz_trace

    fits, plans = [], []
    for path in args.trace:
        trace = read_npz_trace(path, num_experts=args.num_experts)
        wanted = chosen_methods(
            args.methods,
            token_ids=bool((trace.token_id >= 0).any()),
            redundant_slots=args.redundant_slots,
        )
        predict = any(method.scheduled and method.mode == "tokens" for method in wanted)
        fits += [(path, seed, predict, args) for seed in range(args.seeds)]
        # One placement serves every method that differs only in home ranks.
        alike: dict[tuple[str, bool], list[Method]] = {}
        for method in wanted:
            alike.setdefault((method.policy, method.replicated), []).append(method)
        plans += [(path, group, ep_size, args) for ep_size in args.ep for group in alike.values()]
    # A fresh process each: peak_mb is then its own, and nothing stays cached.
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(args.jobs, mp_context=context, max_tasks_per_child=1) as pool,
        tempfile.TemporaryDirectory() as folder,
    ):
        list(pool.map(_learn, fits, itertools.repeat(folder)))
        parts = _progress(pool.map(_measure, plans, itertools.repeat(folder)), len(plans))
        rows = [row for part in parts for row in part]
    rows.sort(key=lambda row: list(methods()).index(row["method"]))
    return Result(
        theme="plan",
        protocol=_protocol(args),
        rows=rows,
        tables=list(_tables(rows)),
        charts=_charts(rows),
    )


def _learned_file(folder: str, path: Path, seed: int) -> Path:
    return Path(folder) / f"{path.stem}-{seed}.pickle"


def _learn(task: tuple[Path, int, bool, argparse.Namespace], folder: str) -> None:
    """Learn from one split of a trace, for all methods: a predictor knows no placement."""
    from benchmarks.plan_protocol import learn
    from semantic_ep.observe.formats import read_npz_trace

    path, seed, predict, args = task
    trace = read_npz_trace(path, num_experts=args.num_experts)
    profiled, _ = trace.split(args.profile_fraction, seed=seed)
    learned = learn(profiled, ep_size=args.ep[0], seed=seed, predict=predict)
    with _learned_file(folder, path, seed).open("wb") as file:
        pickle.dump(learned, file)


def _measure(
    task: tuple[Path, list[Method], int, argparse.Namespace], folder: str
) -> list[dict[str, Any]]:
    """All seeds of methods that share a placement, on one trace, in a process of its own."""
    from benchmarks.plan_protocol import count, place
    from semantic_ep.observe.formats import read_npz_trace
    from semantic_ep.plan.policies import policy
    from semantic_ep.plan.replicas import WithReplicas
    from semantic_ep.topology import Topology

    path, group, ep_size, args = task
    chosen = policy(group[0].policy)
    if group[0].replicated:
        chosen = WithReplicas(policy=chosen, slots_per_rank=args.redundant_slots // ep_size)
    topology = Topology.uniform(ep_size, num_nodes=args.nodes)
    trace = read_npz_trace(path, num_experts=args.num_experts)
    rows = []
    for seed in range(args.seeds):
        with _learned_file(folder, path, seed).open("rb") as file:
            learned = pickle.load(file)  # written by _learn, in this run
        _, evaluated = trace.split(args.profile_fraction, seed=seed)
        placements = -(-RANDOM_PLACEMENTS // args.seeds) if group[0].policy == "random" else 1
        counted: dict[str, list[list[dict[str, Any]]]] = {method.name: [] for method in group}
        for number in range(placements):
            placement, seconds = place(
                learned,
                chosen,
                ep_size=ep_size,
                seed=seed * placements + number,
                topology=topology,
                time_limit=args.time_limit,
            )
            for method in group:
                knowing = learned if method.scheduled else None
                by_layer = count(evaluated, placement, knowing, method.mode, topology=topology)
                spent = seconds + (knowing.seconds if knowing and method.mode == "tokens" else 0)
                peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                own = {"solve_seconds": spent, "peak_mb": peak_mb}
                counted[method.name].append([{**row, **own} for row in by_layer])
        case = {
            "trace": path.stem,
            "ep_size": ep_size,
            "profile_fraction": args.profile_fraction,
            "seed": seed,
        }
        for method in group:
            for same_layer in zip(*counted[method.name], strict=True):
                figures = {
                    name: statistics.fmean(row[name] for row in same_layer) for name in FIGURES
                }
                named = {
                    "method": method.name,
                    "mode": method.mode,
                    "layer": same_layer[0]["layer"],
                }
                rows.append({**case, **named, **figures})
    return rows


def _progress(parts: Iterable[Any], total: int) -> Iterator[Any]:
    from tqdm import tqdm

    yield from tqdm(parts, total=total, unit="method", disable=None)


def _protocol(args: argparse.Namespace) -> dict[str, Any]:
    from semantic_ep.plan.requests import WINDOW_REQUESTS
    from semantic_ep.plan.slices import BATCH_TOKENS

    return {
        "traces": [path.name for path in args.trace],
        "split": f"by request, {args.profile_fraction:.0%} profiled, the rest evaluated",
        "seeds": args.seeds,
        "nodes": args.nodes,
        "redundant_slots": args.redundant_slots,
        "time_limit": args.time_limit,
        "tokens": f"equal slices in every batch of {BATCH_TOKENS} consecutive tokens",
        "requests": f"whole requests, in windows of {WINDOW_REQUESTS}",
        "random": f"mean of {RANDOM_PLACEMENTS} placements over all seeds",
        "evaluated": "every token of every MoE layer, unseen token ids included",
        "definitions": {
            "lar": "share of (token, expert) activations on the token's home rank",
            "remote_copies": "mean distinct ranks other than home that a token is sent to",
            "node_copies": "mean distinct nodes other than home's that a token is sent to",
            "load_max_over_mean": "activations on the busiest rank over the mean of ranks",
            "tokens_max_over_mean": "home tokens on the fullest rank over the mean of ranks",
            "solve_seconds": "wall time of planning: placement and, if scheduled, predictor "
            "(fitted once a split, for all methods)",
            "peak_mb": "largest resident memory of the process of all methods on one placement, "
            "reading the trace included",
        },
    }


def _tables(rows: Sequence[Row]) -> Iterator[Table]:
    means = [row for row in rows if row["layer"] == "mean"]
    for trace, ep_size in dict.fromkeys((row["trace"], row["ep_size"]) for row in means):
        here = [row for row in means if (row["trace"], row["ep_size"]) == (trace, ep_size)]
        by_method: dict[str, list[Row]] = {}
        for row in here:
            by_method.setdefault(row["method"], []).append(row)
        plain = {
            row["mode"]: statistics.fmean(other["remote_copies"] for other in by_method[name])
            for name in ("contiguous", "contiguous-requests")
            for row in by_method.get(name, [])
        }
        yield Table(
            title=f"{trace}, EP{ep_size}: mean over layers, mean ± standard deviation over "
            f"{len(next(iter(by_method.values())))} splits",
            rows=[_summary(name, group, plain) for name, group in by_method.items()],
        )


def _summary(name: str, group: Sequence[Row], plain: dict[str, float]) -> Row:
    def mean(figure: str) -> float:
        return statistics.fmean(row[figure] for row in group)

    base = plain.get(group[0]["mode"])
    change = None if not base else f"{mean('remote_copies') / base - 1:+.1%}"
    return {
        "method": name,
        "lar": f"{mean('lar'):.4f} ± {statistics.pstdev(row['lar'] for row in group):.4f}",
        "remote_copies": f"{mean('remote_copies'):.4f}",
        "vs contiguous": change or "",
        "node_copies": mean("node_copies"),
        "load max/mean": mean("load_max_over_mean"),
        "tokens max/mean": mean("tokens_max_over_mean"),
        "solve s": mean("solve_seconds"),
        "peak MB": round(max(row["peak_mb"] for row in group)),
    }


def _charts(rows: Sequence[Row]) -> list[Chart]:
    means = [row for row in rows if row["layer"] == "mean"]
    charts = []
    for trace in dict.fromkeys(row["trace"] for row in means):
        here = [{**row, "EP": f"EP{row['ep_size']}"} for row in means if row["trace"] == trace]
        for figure, label in (("lar", "LAR"), ("remote_copies", "remote copies a token")):
            charts.append(
                Chart(
                    title=f"{trace}: {label}",
                    kind="bars",
                    rows=here,
                    x="method",
                    y=figure,
                    series="EP",
                    y_label=label,
                )
            )
    return charts
