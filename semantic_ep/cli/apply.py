"""`semantic-ep apply`: write a checkpoint permuted by a plan, or undo it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from semantic_ep.cli.tracking import add_wandb_argument, refuse_dry_run
from semantic_ep.errors import ConfigError, explain

if TYPE_CHECKING:
    from semantic_ep.apply.checkpoint import RewriteSummary
    from semantic_ep.apply.checkpoint.writer import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this verb."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="Hugging Face checkpoint"
    )
    parser.add_argument("--plan", type=Path, metavar="DIR", help="plan to apply")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="new directory to write"
    )
    parser.add_argument(
        "--undo", action="store_true", help="restore the logical order instead of applying a plan"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    parser.add_argument(
        "--allow-retrained",
        action="store_true",
        help="accept weights that were trained further since the plan was made or applied",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    add_wandb_argument(
        parser, "record plan -> checkpoint in metrics.jsonl beside the new directory and in"
    )


def run(args: argparse.Namespace) -> int:
    """Apply or undo; returns the exit code."""
    from tqdm import tqdm

    _check_flags(args)
    refuse_dry_run(args)
    # A batch system ends jobs with SIGTERM; treat it like Ctrl-C, so that nothing is left behind.
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with tqdm(
            unit="B",
            unit_scale=True,
            desc="undo" if args.undo else "apply",
            disable=args.json or args.dry_run or not sys.stderr.isatty(),
        ) as bar:

            def advance(count: int, total: int) -> None:
                bar.total = total
                bar.update(count)

            summary = _rewrite(args, advance)
    finally:
        signal.signal(signal.SIGTERM, previous)
    if args.wandb != "disabled":
        _track(args, summary)
    _print(summary, args)
    return 0


def _rewrite(args: argparse.Namespace, progress: Progress) -> RewriteSummary:
    from semantic_ep.apply.checkpoint import apply_layout, undo_layout
    from semantic_ep.apply.layout import Layout
    from semantic_ep.plan.plan import Plan

    if args.undo:
        return undo_layout(
            args.checkpoint,
            args.output,
            allow_retrained=args.allow_retrained,
            dry_run=args.dry_run,
            progress=progress,
        )
    plan = Plan.read(args.plan)
    return apply_layout(
        args.checkpoint,
        Layout.from_placement(plan.placement, plan.fingerprint),
        args.output,
        plan_sha256=plan.sha256,
        allow_retrained=args.allow_retrained,
        dry_run=args.dry_run,
        progress=progress,
    )


def _track(args: argparse.Namespace, summary: RewriteSummary) -> None:
    """Record what the new checkpoint was made of."""
    from semantic_ep.tracking import Tracker

    with Tracker.start(
        args.output.absolute().parent, config=vars(args), job_type="apply", wandb=args.wandb
    ) as tracker:
        tracker.log({"plan/apply/moved_experts": summary.moved, "plan/apply/bytes": summary.bytes})
        tracker.log_artifact(args.checkpoint, "checkpoint", role="input")
        if args.plan is not None:
            tracker.log_artifact(args.plan, "plan", role="input")
        tracker.log_artifact(args.output, "checkpoint")


def _check_flags(args: argparse.Namespace) -> None:
    if args.undo == (args.plan is not None):
        raise ConfigError(
            explain(
                "give either a plan to apply or --undo",
                where="--plan, --undo",
                got="both" if args.undo else "neither",
            )
        )


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _print(summary: RewriteSummary, args: argparse.Namespace) -> None:
    if args.json:
        fields = {**dataclasses.asdict(summary), "output": str(summary.output)}
        print(json.dumps({**fields, "undo": args.undo, "dry_run": args.dry_run}))
        return
    verb = "Would write" if args.dry_run else "Wrote"
    order = "logical order" if args.undo else "the order of the plan"
    print(
        f"{verb} {summary.output}: {summary.layers} MoE layers x {summary.experts} experts in "
        f"{order}, {summary.moved} of {summary.layers * summary.experts} experts moved, "
        f"{summary.shards} shards, {summary.bytes / 1e6:,.1f} MB."
    )
    for name in summary.left_out:
        print(f"Left out, as it is not permuted: {name}")
