"""`semantic-ep simulate`: what a plan makes other routing cost, and whether it is out of date.

`semantic-ep simulate groups` shows the process groups of a job instead.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    from semantic_ep.cli import simulate_groups
    from semantic_ep.cli.plan import add_topology_arguments

    others = parser.add_subparsers(metavar="[groups]", title="something else to simulate")
    what = "show the process groups of a job of any size"
    groups = others.add_parser("groups", help=what, description=what)
    simulate_groups.add_arguments(groups)
    groups.set_defaults(run=simulate_groups.run)
    parser.add_argument("--plan", type=Path, metavar="DIR", help="plan in force")
    parser.add_argument("--trace", type=Path, metavar="DIR", help="count this trace under the plan")
    parser.add_argument(
        "--mode", choices=("requests", "tokens"), default="requests", help="what gets a home rank"
    )
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="the profile that the plan was made from"
    )
    parser.add_argument(
        "--fresh", type=Path, metavar="DIR", help="today's profile: has routing drifted?"
    )
    parser.add_argument(
        "--horizon-tokens", type=float, metavar="N", help="tokens expected until it drifts again"
    )
    parser.add_argument("--hidden-size", type=int, metavar="D", help="for the advice to re-plan")
    parser.add_argument("--element-bytes", type=int, default=2, metavar="B")
    parser.add_argument("--expert-bytes", type=int, metavar="B", help="weights of one expert")
    add_topology_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    """Count, compare, print; exit code 1 when planning again pays."""
    from semantic_ep.cli import EXIT_NO, EXIT_OK
    from semantic_ep.errors import ConfigError, explain
    from semantic_ep.plan.plan import Plan

    if args.plan is None:
        raise ConfigError(explain("no plan was given", where="--plan", do="Name its directory"))
    if args.trace is None and args.fresh is None:
        raise ConfigError(
            explain(
                "nothing to simulate", where="--trace, --fresh", do="Give a trace, or two profiles"
            )
        )
    plan = Plan.read(args.plan)
    result: dict[str, Any] = {"plan": str(args.plan), "ep_size": plan.placement.ep_size}
    if args.trace is not None:
        result["cost"] = _count(args, plan)
    if args.fresh is not None:
        result["drift"] = _drift(args, plan)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        _print(result)
    return EXIT_NO if result.get("drift", {}).get("replan") else EXIT_OK


def _count(args: argparse.Namespace, plan: Any) -> list[dict[str, Any]]:
    from semantic_ep.cli.plan import topology_of
    from semantic_ep.observe.profile import RoutingProfile
    from semantic_ep.observe.traces import RoutingTrace
    from semantic_ep.plan.cost import evaluate
    from semantic_ep.plan.verdict import home_ranks, rows_of_cost

    trace = RoutingTrace.load(args.trace)
    plan.fingerprint.check(trace.fingerprint, what=f"--trace {args.trace}", allow_retrained=True)
    profile = RoutingProfile.read(args.profile) if args.profile else None
    home = home_ranks(trace, plan.placement, profile, args.mode)
    topology = topology_of(args, plan.placement.ep_size)
    return rows_of_cost(evaluate(plan.placement, trace, home, topology=topology))


def _drift(args: argparse.Namespace, plan: Any) -> dict[str, Any]:
    from semantic_ep.cli.plan import topology_of
    from semantic_ep.errors import ConfigError, explain
    from semantic_ep.observe.profile import RoutingProfile
    from semantic_ep.plan.drift import advise, measure_drift
    from semantic_ep.plan.moving import relabel_ranks
    from semantic_ep.plan.policies import policy

    needed = ("profile", "horizon_tokens", "hidden_size", "expert_bytes")
    missing = [f"--{name.replace('_', '-')}" for name in needed if getattr(args, name) is None]
    if missing:
        raise ConfigError(
            explain(
                "advice to plan again needs more than a fresh profile",
                where="--fresh",
                got=f"no {', '.join(missing)}",
                do="Give them",
            )
        )
    fresh = RoutingProfile.read(args.fresh)
    drift = measure_drift(RoutingProfile.read(args.profile), fresh)
    ep_size = plan.placement.ep_size
    topology = topology_of(args, ep_size)
    name = "semantic-requests" if args.mode == "requests" else "semantic"
    candidate = policy(name).place(fresh, ep_size=ep_size, seed=args.seed, topology=topology)
    advice = advise(
        fresh,
        plan.placement,
        relabel_ranks(
            candidate, plan.placement, shared_ranks=args.mode == "requests", topology=topology
        ),
        row_bytes=args.hidden_size * args.element_bytes,
        expert_bytes=args.expert_bytes,
        horizon_tokens=args.horizon_tokens,
        topology=topology,
    )
    return {
        "load_distance": drift.load_distance.tolist(),
        "token_distance": drift.token_distance,
        "unseen_tokens": drift.unseen_tokens,
        "replan": advice.replan,
        "saved_bytes": advice.saved_bytes,
        "bytes_to_move": advice.bytes_to_move,
        "reason": advice.reason,
    }


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if "cost" in result:
        rows = result["cost"]
        table = Table(title=f"EP{result['ep_size']}")
        for name in rows[0]:
            table.add_column(name.replace("_", " "), justify="right")
        for row in rows:
            table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(table)
    if "drift" in result:
        drift = result["drift"]
        distance = sum(drift["load_distance"]) / len(drift["load_distance"])
        console.print(
            f"expert load moved by {distance:.1%} (mean over layers), token frequencies by "
            f"{drift['token_distance']:.1%}; {drift['unseen_tokens']:.1%} of tokens are new to the "
            "plan"
        )
        console.print(drift["reason"])
