"""`semantic-ep export`: a plan's placement in the file that another serving engine reads."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semantic_ep.plan.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    from semantic_ep.apply.exporters import ENGINES

    parser.add_argument("--plan", type=Path, required=True, metavar="DIR", help="plan to export")
    parser.add_argument(
        "--to", required=True, choices=tuple(ENGINES), metavar="ENGINE", help=", ".join(ENGINES)
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="file to write"
    )
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")


def run(args: argparse.Namespace) -> int:
    """Write the file, and say what the engine needs to use it."""
    from semantic_ep.apply.exporters import ENGINES
    from semantic_ep.cli import EXIT_OK
    from semantic_ep.plan.plan import Plan

    plan = Plan.read(args.plan)
    engine = ENGINES[args.to]
    placement = plan.placement
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, args.output.name) if args.dry_run else args.output
        engine.write(placement, output, plan.fingerprint.layer_ids)
    result: dict[str, Any] = {
        "engine": args.to,
        "output": None if args.dry_run else str(args.output),
        "layers": placement.num_layers,
        "ep_size": placement.ep_size,
        "slots_per_rank": placement.slots_per_rank,
        "needs": list(engine.needs(placement, args.output)),
        "remote_copies_saved": _saved_by_placement(plan),
    }
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        _print(result)
    return EXIT_OK


def _saved_by_placement(plan: Plan) -> float | None:
    """Share of remote copies that the placement saves without the schedule, held out.

    None for a plan whose verdict does not tell.
    """
    copies: dict[str, float] = {
        row["policy"]: row["remote_copies"]
        for row in plan.verdict.get("policies", ())
        if row["schedule"] == "in order"
    }
    if "contiguous" not in copies:
        return None
    chosen: str = plan.verdict["policies"][-1]["policy"]
    return 1 - copies[chosen] / max(copies["contiguous"], 1e-12)


def _print(result: dict[str, Any]) -> None:
    written = f"written to {result['output']}" if result["output"] else "dry run: not written"
    print(
        f"{result['layers']} MoE layers on {result['ep_size']} ranks of "
        f"{result['slots_per_rank']} slots, {written}"
    )
    print(f"{result['engine']} needs:")
    for need in result["needs"]:
        print(f"  {need}")
    if result["remote_copies_saved"] is not None:
        print(
            "The engine places experts but chooses home ranks by its own rule. Held out, the "
            f"placement alone saves {result['remote_copies_saved']:.1%} of remote copies."
        )
