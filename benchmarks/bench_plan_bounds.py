"""How close the semantic plan comes to what knowing the true routes would reach.

For each trace and EP size, on the evaluated requests and under the same equal slices or windows:

* contiguous: experts in order, and home ranks without a look at affinity;
* reached: planned on the profiled requests, home ranks predicted;
* oracle homes: the same placement, home ranks chosen knowing the true routes. No predictor can do
  better on this placement;
* oracle placement and homes: the placement too is planned on the evaluated requests and their true
  routes. The search is heuristic, so this is what is known to be possible, not a proof;
* oracle placement for copies (tokens alone): as before, planned for the fewest ranks that tokens
  touch and for nothing else;
* oracle placement for LAR (requests alone): as before, planned for local activations and for
  nothing else.

Expert load is kept to what the plan is allowed on all levels.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.registry import Chart, Result, Row, Table, mean_of
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.bounds import KnownRoutes, oracle_home_ranks
from semantic_ep.plan.cost import evaluate
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.predictor_choice import choose_predictor
from semantic_ep.plan.samples import Evidence
from semantic_ep.plan.slices import BATCH_TOKENS
from semantic_ep.plan.solver import SemanticPolicy
from semantic_ep.plan.verdict import home_ranks

_FIGURES = ("lar", "remote_copies", "load_max_over_mean", "tokens_max_over_mean")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the theme's flags."""
    parser.add_argument("--trace", type=Path, required=True, action="append")
    parser.add_argument("--num-experts", type=int, help="experts of the traces' model")
    parser.add_argument("--ep", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--mode", choices=("tokens", "requests"), default="tokens")
    parser.add_argument("--profile-fraction", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, default=1)


def run(args: argparse.Namespace) -> Result:
    """Measure all levels."""
    from semantic_ep.observe.formats import read_npz_trace

    rows = []
    for path in args.trace:
        trace = read_npz_trace(path, num_experts=args.num_experts)
        for ep_size in args.ep:
            for seed in range(args.seeds):
                parts = trace.split(args.profile_fraction, seed=seed)
                case = {"trace": path.stem, "ep_size": ep_size, "mode": args.mode, "seed": seed}
                rows += [{**case, **row} for row in _levels(*parts, ep_size, seed, args.mode)]
    protocol = {
        "split": f"by request, {args.profile_fraction:.0%} profiled, the rest evaluated",
        "seeds": args.seeds,
        "mode": args.mode,
        "levels": (__doc__ or "").partition("windows:\n\n")[2].rstrip(),
    }
    summary = list(_summary(rows))
    return Result(
        theme="plan_bounds",
        protocol=protocol,
        rows=rows,
        tables=[Table(title="Mean over layers and splits", rows=summary)],
        charts=[
            Chart(
                title=title,
                kind="bars",
                rows=[{**row, "case": f"{row['trace']}, EP{row['ep_size']}"} for row in summary],
                x="case",
                y=figure,
                y_label=title,
                series="level",
            )
            for figure, title in (("lar", "LAR"), ("remote_copies", "remote copies a token"))
        ],
    )


def _summary(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    for key in dict.fromkeys((row["trace"], row["ep_size"], row["level"]) for row in rows):
        same = [row for row in rows if (row["trace"], row["ep_size"], row["level"]) == key]
        yield {
            "trace": key[0],
            "ep_size": key[1],
            "level": key[2],
            **{name: mean_of(same, name) for name in _FIGURES},
        }


def _levels(
    profiled: RoutingTrace, evaluated: RoutingTrace, ep_size: int, seed: int, mode: str
) -> list[dict[str, Any]]:
    vocab = int(max(profiled.token_id.max(), evaluated.token_id.max())) + 1
    profile = RoutingProfile.from_trace(profiled, vocab_size=vocab)
    policy = SemanticPolicy(mode="tokens" if mode == "tokens" else "requests")
    predictor = None
    if policy.mode == "tokens":
        predictor = choose_predictor(
            profiled, profile, ep_size=ep_size, batch=BATCH_TOKENS, seed=seed
        )
        evidence = Evidence(trace=profiled, predictor=predictor)
        policy = dataclasses.replace(policy, evidence=evidence)
    placement = policy.place(profile, ep_size=ep_size, seed=seed)
    home = home_ranks(evaluated, placement, profile, policy.mode, predictor=predictor)
    known = RoutingProfile.from_trace(evaluated, vocab_size=vocab)
    where = {"oracle homes": placement}
    routes = Evidence(trace=evaluated, predictor=KnownRoutes(trace=evaluated))
    knowing = {"oracle placement and homes": dataclasses.replace(policy, evidence=routes)}
    if policy.mode == "tokens":
        touches = KnownRoutes(trace=evaluated, homes_count=False)
        knowing["oracle placement for copies"] = dataclasses.replace(
            policy, evidence=Evidence(trace=evaluated, predictor=touches)
        )
    else:
        knowing["oracle placement for LAR"] = dataclasses.replace(policy, pair_weight=0.0)
    for name, oracle in knowing.items():
        where[name] = oracle.place(known, ep_size=ep_size, seed=seed)
    plain = Placement.contiguous(
        num_layers=placement.num_layers, num_experts=placement.num_experts, ep_size=ep_size
    )
    blind = home_ranks(evaluated, plain, None, policy.mode)
    levels = {
        "contiguous": evaluate(plain, evaluated, blind),
        "reached": evaluate(placement, evaluated, home),
    }
    for name, place in where.items():
        levels[name] = evaluate(place, evaluated, oracle_home_ranks(place, evaluated, mode))
    return [{"level": name, **cost.mean()} for name, cost in levels.items()]
