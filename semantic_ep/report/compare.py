"""Several runs side by side: the headline of each, on one page.

schema_version  1
made            at, versions
numbers         [{id, label, unit, better}], the union over the runs in order
runs            [{run, path, model, ep_size, answer, sentence, basis,
                  plan_diff, see `semantic_ep.report.plan_diff`,
                  numbers {id: {before, after, change, source}}}], as given
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from semantic_ep.report.build import SCHEMA_VERSION, build_report
from semantic_ep.report.plan_diff import plan_diffs


def compare_runs(run_dirs: Sequence[str | Path]) -> dict[str, Any]:
    """Build the report of each run and keep the headlines.

    Raises:
        ArtifactError, FingerprintError: As `build_report`, for the first run that is at fault.
    """
    reports = [build_report(run) for run in run_dirs]
    numbers: dict[str, dict[str, Any]] = {}
    for report in reports:
        for entry in report["headline"]["numbers"]:
            shared = {key: entry[key] for key in ("id", "label", "unit", "better")}
            numbers.setdefault(entry["id"], shared)
    return {
        "schema_version": SCHEMA_VERSION,
        "made": reports[0]["made"],
        "numbers": list(numbers.values()),
        "runs": [
            {**_row(report, Path(run)), "plan_diff": diff}
            for report, run, diff in zip(
                reports, run_dirs, plan_diffs([Path(run) for run in run_dirs]), strict=True
            )
        ],
    }


def _row(report: dict[str, Any], path: Path) -> dict[str, Any]:
    owner = report["serve"] or report["plan"]
    head = report["headline"]
    return {
        "run": report["run"],
        "path": str(path),
        "model": report["model"],
        "ep_size": owner["ep_size"] if owner else None,
        **{key: head[key] for key in ("answer", "sentence", "basis")},
        "numbers": {
            entry["id"]: {key: entry[key] for key in ("before", "after", "change", "source")}
            for entry in head["numbers"]
        },
    }
