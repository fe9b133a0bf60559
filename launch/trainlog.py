"""The training log that both training entries write."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from torch import distributed as dist
from tqdm import tqdm

from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.summary import routing_metrics
from semantic_ep.tracking import Tracker


def log_step(row: dict[str, Any], output: Path, tracker: Tracker, *, shown: str) -> None:
    """Append a row to train.jsonl and track it, on rank 0; `shown` follows step and loss."""
    if dist.get_rank() != 0:
        return
    with (output / "train.jsonl").open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    metrics = {f"train/{name}": value for name, value in row.items() if name != "step"}
    tracker.log(metrics, step=row["step"])
    tqdm.write(f"step {row['step']:>5}  loss {row['loss']:.3f}  {shown}")


def log_profile(output: Path, tracker: Tracker, *, step: int) -> None:
    """Track what the profile says that was written with a checkpoint."""
    if tracker.active:
        tracker.log(routing_metrics(RoutingProfile.read(output)), step=step)


class _AboveProgress(logging.Handler):
    """Prints a line without breaking the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))


def show_reports() -> None:
    """Print on rank 0 what the package reports while it trains: profiles, drift, decisions."""
    if dist.get_rank() == 0:
        reports = logging.getLogger("semantic_ep.integrations")
        reports.setLevel(logging.INFO)
        reports.addHandler(_AboveProgress())
