"""Latency against throughput, from a benchmark of serving under rising load.

A point is one load; a curve joins the points of one plan and scheduling policy. One knee point says
little: a comparison is of whole curves.
"""

from __future__ import annotations

import math
from typing import Any

from semantic_ep.report.sources import LOAD_FILE, LoadRow, RunSources

_FIGURES = ("new_tokens_per_second", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "goodput")


def load_curves(sources: RunSources) -> dict[str, Any] | None:
    """Collect the curves.

    Returns:
        `{"source", "made_of", "ranks", "baseline": [plan, policy], "slo_ms", "command", "curves"}`,
        a curve being `{"plan", "policy", "points"}` with points in order of load: `{"load",
        "requests_per_second_offered" or null where all requests arrived at once, "new_tokens_per_
        second", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "goodput"}`; None without a benchmark.
    """
    if sources.load is None:
        return None
    grouped: dict[tuple[str, str], list[LoadRow]] = {}
    for row in sources.load.rows:
        if row.plan and row.ttft_p50_ms is not None:
            grouped.setdefault((row.plan, row.policy), []).append(row)
    protocol = sources.load.protocol
    return {
        "source": LOAD_FILE,
        "made_of": protocol.source,
        "ranks": protocol.ranks,
        "baseline": [part.strip() for part in protocol.baseline.split(",")],
        "slo_ms": protocol.slo_ms,
        "command": sources.load.command,
        "curves": [
            {
                "plan": plan,
                "policy": policy,
                "points": [_point(row) for row in sorted(rows, key=_at)],
            }
            for (plan, policy), rows in grouped.items()
        ],
    }


def _at(row: LoadRow) -> float:
    offered = row.requests_per_second_offered
    return math.inf if offered is None else offered


def _point(row: LoadRow) -> dict[str, Any]:
    names = ("load", "requests_per_second_offered", *_FIGURES)
    return {name: getattr(row, name) for name in names}
