"""Rows, tables and charts of the serve theme, from what its clients saw."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.registry import Chart, Row, Table

if TYPE_CHECKING:
    from benchmarks.serve_ranks import Measured, Run, Served

SLO_FACTOR = 5
CELLS, GENERATE = "cells", "engine against generate"


def latencies(requests: Sequence[Served]) -> dict[str, np.ndarray]:
    """Milliseconds: "ttft" and "e2e" of each request, from when it was due; "tpot", the mean of a
    request's gaps between tokens, of those with several; "itl", every such gap by itself.
    """
    gaps = [np.diff(request.times) for request in requests]
    seconds = {
        "ttft": [request.times[0] - request.arrived for request in requests],
        "tpot": [one.mean() for one in gaps if len(one)],
        "itl": np.concatenate(gaps),
        "e2e": [request.times[-1] - request.arrived for request in requests],
    }
    return {name: np.asarray(values) * 1e3 for name, values in seconds.items()}


def objective(light: Run) -> tuple[float, float]:
    """TTFT and TPOT in ms that a request must meet: a multiple of those without any load."""
    times = latencies(light.requests)
    return tuple(SLO_FACTOR * float(np.median(times[name])) for name in ("ttft", "tpot"))


def good_requests(requests: Sequence[Served], slo: tuple[float, float]) -> int:
    """Requests that met the objective; a single token has no TPOT to miss."""
    ttft, tpot = slo
    return sum(
        (request.times[0] - request.arrived) * 1e3 <= ttft
        and (request.times[-1] - request.times[0]) * 1e3 <= tpot * (len(request.times) - 1)
        for request in requests
    )


def cell_rows(
    measured: Measured, slo: tuple[float, float], predicted: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row a cell and load: latencies pooled over rounds, rates by round, counters summed."""
    grouped: dict[tuple[float, str, str], list[Run]] = {}
    for one in measured.runs:
        grouped.setdefault((one.load, one.plan, one.policy), []).append(one)
    return [
        {
            "block": CELLS,
            "load": _load_name(load),
            "plan": plan,
            "policy": policy,
            **(
                {}
                if np.isinf(load)
                else {"requests_per_second_offered": load * measured.burst_rate}
            ),
            **_figures(runs, slo),
            "holdout_lar": predicted[plan],
            "same_tokens": True,
        }
        for (load, plan, policy), runs in sorted(grouped.items(), key=lambda item: item[0][0])
    ]


def _figures(runs: Sequence[Run], slo: tuple[float, float]) -> dict[str, Any]:
    requests = [request for one in runs for request in one.requests]
    row: dict[str, Any] = {"n": len(runs), "requests": len(requests)}
    for name, values in latencies(requests).items():
        row[f"{name}_mean_ms"] = float(values.mean()) if len(values) else None
        for percent in (50, 99):
            row[f"{name}_p{percent}_ms"] = (
                float(np.percentile(values, percent)) if len(values) else None
            )
    rates = {
        "new_tokens_per_second": [sum(len(r.tokens) for r in o.requests) / o.seconds for o in runs],
        "requests_per_second": [len(o.requests) / o.seconds for o in runs],
        "goodput": [good_requests(o.requests, slo) / o.seconds for o in runs],
    }
    for name, values_of_rounds in rates.items():
        row[name] = statistics.median(values_of_rounds)
    for percent in (20, 80):
        row[f"new_tokens_per_second_p{percent}"] = float(
            np.percentile(rates["new_tokens_per_second"], percent)
        )
    row["good_share"] = good_requests(requests, slo) / len(requests)
    total = {name: sum(one.counted[name] for one in runs) for name in runs[0].counted}
    tokens = sum(len(request.tokens) for request in requests)
    on_rank = np.bincount([request.rank for request in requests])
    return row | {
        "lar": total["local_activations"] / total["activations"],
        "remote_copies": total["remote_rows"] / total["tokens"],
        "mbytes_to_other_ranks": total["remote_bytes"] / len(runs) / 1e6,
        "bytes_per_new_token": total["remote_bytes"] / tokens,
        "requests_of_busiest_rank": int(on_rank.max()) / len(requests),
    }


def _load_name(load: float) -> str:
    return "all at once" if np.isinf(load) else f"{load:g} of the baseline"


def cell_tables(rows: Sequence[Row], slo: tuple[float, float]) -> list[Table]:
    shown = {
        "plan": "plan",
        "policy": "policy",
        "new_tokens_per_second": "tok/s",
        "ttft_p50_ms": "TTFT p50",
        "ttft_p99_ms": "TTFT p99",
        "tpot_p50_ms": "TPOT p50",
        "tpot_p99_ms": "TPOT p99",
        "itl_p99_ms": "ITL p99",
        "e2e_p50_ms": "E2E p50",
        "e2e_p99_ms": "E2E p99",
        "goodput": "good req/s",
        "lar": "LAR",
        "remote_copies": "remote copies",
        "mbytes_to_other_ranks": "MB to others",
    }
    return [
        Table(
            title=f"load: {load}; ms; SLO: TTFT {slo[0]:.3g} ms, TPOT {slo[1]:.3g} ms",
            rows=[
                {label: row[key] for key, label in shown.items()}
                for row in rows
                if row["load"] == load
            ],
        )
        for load in dict.fromkeys(row["load"] for row in rows)
    ]


def generate_table(rows: Sequence[Row]) -> Table:
    return Table(
        title="One rank of the engine against transformers' generate, the same batch",
        rows=[
            {
                "batch": row["batch"],
                "side": row["side"],
                "tok/s": row["new_tokens_per_second"],
                "ms": row["median_ms"],
                "p20..p80": f"{row['p20_ms']:.3g}..{row['p80_ms']:.3g}",
                "against generate": f"{row['against_generate']:.2f}x",
            }
            for row in rows
        ],
    )


def charts(rows: Sequence[Row], alone: Sequence[Row]) -> list[Chart]:
    last = rows[-1]["load"]
    figures = {
        "new_tokens_per_second": "new tokens/s",
        "ttft_p99_ms": "TTFT p99, ms",
        "goodput": "goodput, requests/s",
        "lar": "LAR",
        "mbytes_to_other_ranks": "MB to other ranks",
    }
    cells = [
        Chart(
            title=f"load {last}: {label}",
            kind="bars",
            rows=[row for row in rows if row["load"] == last],
            x="policy",
            y=figure,
            series="plan",
            y_label=label,
        )
        for figure, label in figures.items()
    ]
    batch = Chart(
        title="One rank against generate",
        kind="bars",
        rows=[{**row, "batch": f"batch {row['batch']}"} for row in alone],
        x="batch",
        y="new_tokens_per_second",
        series="side",
        y_label="new tokens/s",
    )
    return [*cells, batch]
