"""What a replay was worth: latency, throughput, goodput, and what crossed the links."""

from __future__ import annotations

import dataclasses

import numpy as np

from semantic_ep.plan.cost import max_over_mean
from semantic_ep.serve.simulation.simulator import Replay


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """Latency that a request must meet to count as good.

    Attributes:
        ttft_seconds: Time to first token, from arrival.
        tpot_seconds: Time of each token after the first, mean over the request.
    """

    ttft_seconds: float
    tpot_seconds: float


def latencies(replay: Replay) -> dict[str, np.ndarray]:
    """[R] seconds each: "ttft", "tpot" (0 for a single token), "e2e" and "wait" in the queue."""
    decoded = np.maximum(replay.new_tokens - 1, 1)
    return {
        "ttft": replay.first_token - replay.arrived,
        "tpot": (replay.ended - replay.first_token) / decoded,
        "e2e": replay.ended - replay.arrived,
        "wait": replay.assigned - replay.arrived,
    }


def summary(replay: Replay, ep_size: int, objective: Objective | None = None) -> dict[str, float]:
    """Numbers of one replay: latencies in ms (mean, p50, p99), rates a second, shares and means.

    LAR and remote copies are weighted by the tokens that were computed.
    """
    times = latencies(replay)
    row: dict[str, float] = {}
    for name in ("ttft", "tpot", "e2e"):
        milliseconds = times[name] * 1e3
        row[f"{name}_mean_ms"] = float(milliseconds.mean())
        for percent in (50, 99):
            row[f"{name}_p{percent}_ms"] = float(np.percentile(milliseconds, percent))
    span = float(replay.ended.max() - replay.arrived.min())
    computed = replay.prompt_tokens - replay.cached_tokens + replay.new_tokens
    busy = np.bincount(replay.rank, weights=computed, minlength=ep_size)
    row |= {
        "wait_max_ms": float(times["wait"].max() * 1e3),
        "requests_per_second": len(replay.arrived) / span,
        "new_tokens_per_second": float(replay.new_tokens.sum()) / span,
        "lar": float(np.average(replay.local_activations, weights=computed)),
        "remote_copies": float(np.average(replay.remote_copies, weights=computed)),
        "prefix_hit": float(replay.cached_tokens.sum() / replay.prompt_tokens.sum()),
        "tokens_max_over_mean": max_over_mean(busy),
        "transfer_share": replay.transfer_seconds / span,
        "steps": replay.steps,
    }
    if objective is not None:
        good = times["ttft"] <= objective.ttft_seconds
        good &= times["tpot"] <= objective.tpot_seconds
        row["good_share"] = float(good.mean())
        row["goodput"] = float(good.sum()) / span
    return row
