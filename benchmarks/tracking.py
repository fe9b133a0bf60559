"""Record a result in JSONL and W&B, beside the runs that were measured."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.registry import Result
from semantic_ep.tracking import Tracker
from semantic_ep.tracking.wandb_run import WANDB_SETTINGS


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """Declare the flags of recording."""
    parser.add_argument(
        "--track", type=Path, metavar="DIR",
        help="record rows, tables and charts in DIR/metrics.jsonl and W&B (WANDB_* name the run)",
    )  # fmt: skip
    parser.add_argument(
        "--wandb", choices=WANDB_SETTINGS, default="auto",
        help="with --track: auto is online with a key, else offline (default: %(default)s)",
    )  # fmt: skip


def record(
    result: Result,
    document: Mapping[str, Any],
    args: argparse.Namespace,
    *,
    written: Path | None,
    picture: Path | None,
) -> None:
    """Record a result under `benchmark/<theme>/`.

    Args:
        result: What was measured.
        document: The same as it is written; its protocol, environment and commit are the run's
            configuration.
        args: Of the theme.
        written: The JSON file, if there is one; becomes an artefact.
        picture: The PNG, if there is one.

    Raises:
        ConfigError, BackendError, ArtifactError: See `Tracker.start`.
    """
    described = {key: value for key, value in document.items() if key not in ("rows", "tables")}
    with Tracker.start(
        args.track,
        config={**described, "arguments": vars(args)},
        job_type="benchmark",
        wandb=args.wandb,
    ) as tracker:
        home = f"benchmark/{result.theme}"
        if result.rows:
            tracker.log_table(f"{home}/rows", [_flat(row) for row in result.rows])
        for table in result.tables:
            if table.rows:
                tracker.log_table(f"{home}/{_slug(table.title)}", [_flat(r) for r in table.rows])
        if picture is not None and picture.is_file():
            tracker.log_image(f"{home}/charts", picture)
        if written is not None:
            tracker.log_artifact(written, "benchmark")


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose cells are numbers, truths, texts or None."""
    return {
        key: value if value is None or isinstance(value, bool | int | float | str) else str(value)
        for key, value in row.items()
    }


def _slug(title: str) -> str:
    """A title as part of a metric's name."""
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")[:60].rstrip("_")
