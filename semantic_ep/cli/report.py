"""`semantic-ep report`: draw what the stages of a run measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantic_ep.cli.tracking import add_wandb_argument

if TYPE_CHECKING:
    from semantic_ep.tracking import WandbSetting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "run_dirs", type=Path, nargs="+", metavar="RUN", help="run directory; several are compared"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="where to write (default: the only RUN)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print report.json instead, and write nothing"
    )
    add_wandb_argument(
        parser, "record numbers and pictures in metrics.jsonl beside the report and in"
    )


def run(args: argparse.Namespace) -> int:
    """Build, draw, say where it is."""
    return _one(args) if len(args.run_dirs) == 1 else _several(args)


def _one(args: argparse.Namespace) -> int:
    from semantic_ep.cli import EXIT_OK
    from semantic_ep.report.build import build_report
    from semantic_ep.report.write import to_json, write_report

    report = build_report(args.run_dirs[0])
    if args.json:
        print(to_json(report), end="")
        return EXIT_OK
    output = args.output or args.run_dirs[0]
    files = write_report(report, output)
    if args.wandb != "disabled":
        _log(report, args.run_dirs[0], files, output, args.wandb)
    print(report["headline"]["sentence"])
    for stage in report["stages"]:
        if not stage["done"]:
            print(f"not run: {stage['title']} ({stage['source']} is not there)")
    print(f"written: {files[-1]}")
    return EXIT_OK


def _several(args: argparse.Namespace) -> int:
    from semantic_ep.cli import EXIT_OK
    from semantic_ep.errors import ConfigError, explain
    from semantic_ep.report.compare import compare_runs
    from semantic_ep.report.write import to_json, write_comparison

    if args.output is None and not args.json:
        raise ConfigError(
            explain("a comparison of several runs belongs to none of them", do="Give -o DIR")
        )
    if args.wandb != "disabled":
        raise ConfigError(
            explain(
                "only the report of a single run is logged to Weights & Biases",
                where="--wandb",
                got=args.wandb,
                do="Leave it out, or report each run by itself",
            )
        )
    comparison = compare_runs(args.run_dirs)
    if args.json:
        print(to_json(comparison), end="")
        return EXIT_OK
    files = write_comparison(comparison, args.output)
    for row in comparison["runs"]:
        print(f"{row['run']}: {row['sentence']}")
    print(f"written: {files[-1]}")
    return EXIT_OK


def _log(
    report: dict[str, Any], run_dir: Path, files: list[Path], output: Path, wandb: WandbSetting
) -> None:
    from semantic_ep.tracking import Tracker

    with Tracker.start(output, job_type="report", wandb=wandb) as tracker:
        prefix = "serving" if report["serve"] else "plan"
        for number in report["headline"]["numbers"]:
            for side in ("before", "after"):
                tracker.log({f"{prefix}/{number['id']}/{side}": number[side]})
        for file in files:
            if file.suffix == ".png":
                tracker.log_image(f"{prefix}/{file.stem}", file)
        if report["plan"]:
            tracker.log_table("plan/policies", report["plan"]["policies"])
        for kind in ("profile", "plan"):
            if report["observe" if kind == "profile" else "plan"]:
                tracker.log_artifact(run_dir / kind, kind, role="input")
        tracker.log_artifact(files[-1], "report")
