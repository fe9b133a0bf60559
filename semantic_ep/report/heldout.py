"""The plan layer by layer on held-out routing: what each kind of schedule reaches, and the ceiling.

Counted with the planner's own cost model and schedules, on this run's plan, profile and holdout.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.cost import evaluate
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.requests import WINDOW_REQUESTS, assign_in_windows
from semantic_ep.plan.slices import BATCH_TOKENS, slices_in_batches
from semantic_ep.plan.verdict import home_ranks
from semantic_ep.report.sources import HOLDOUT_DIR, PLAN_DIR, PROFILE_DIR, RunSources

# Enough for a percent or two; token schedules of long traces would make a report slow.
MAX_TOKENS = 16_384
TITLES = {
    "contiguous": "Contiguous, requests in order",
    "requests": "Semantic, whole requests by affinity",
    "requests_ceiling": "Semantic, whole requests, routes known in advance",
    "tokens": "Semantic, single tokens by affinity",
    "tokens_ceiling": "Semantic, single tokens, routes known in advance",
}


def held_out(sources: RunSources) -> dict[str, Any] | None:
    """Count every schedule of `TITLES` on the held-out trace.

    Returns:
        `{"source", "tokens", "batch_tokens", "window_requests", "schedules"}`, a schedule being
        `{"id", "title", "lar": [L], "remote_copies": [L], "lar_mean", "remote_copies_mean"}`; None
        without plan, profile or held-out trace, or where contiguous ranks would be unequal.
    """
    plan, profile, trace = sources.plan, sources.profile, sources.holdout
    if plan is None or profile is None or trace is None:
        return None
    placement = plan.placement
    if placement.num_experts % placement.ep_size:
        return None
    trace = sampled(trace)
    contiguous = Placement.contiguous(
        num_layers=placement.num_layers,
        num_experts=placement.num_experts,
        ep_size=placement.ep_size,
    )
    homes = {
        "contiguous": home_ranks(trace, contiguous, None, "requests"),
        "requests": home_ranks(trace, placement, profile, "requests"),
        "requests_ceiling": _requests_if_known(placement, trace),
        "tokens": home_ranks(trace, placement, profile, "tokens"),
        "tokens_ceiling": _tokens_if_known(placement, trace),
    }
    schedules = []
    for name, home in homes.items():
        cost = evaluate(contiguous if name == "contiguous" else placement, trace, home)
        schedules.append(
            {
                "id": name,
                "title": TITLES[name],
                "lar": cost.lar.tolist(),
                "remote_copies": cost.remote_copies.tolist(),
                "lar_mean": float(cost.lar.mean()),
                "remote_copies_mean": float(cost.remote_copies.mean()),
            }
        )
    return {
        "source": f"{PLAN_DIR}/, {PROFILE_DIR}/ and {HOLDOUT_DIR}/",
        "tokens": trace.num_tokens,
        "batch_tokens": BATCH_TOKENS,
        "window_requests": WINDOW_REQUESTS,
        "schedules": schedules,
    }


def sampled(trace: RoutingTrace) -> RoutingTrace:
    """Whole requests, drawn at random, up to about `MAX_TOKENS` tokens; at least one."""
    order = np.random.default_rng(0).permutation(trace.num_requests)
    within = np.cumsum(np.diff(trace.offsets)[order]) <= MAX_TOKENS
    return trace.select_requests(np.sort(order[: max(int(within.sum()), 1)]))


def _requests_if_known(placement: Placement, trace: RoutingTrace) -> np.ndarray:
    """[N] ranks of requests chosen by their true activations, balanced as in `home_ranks`."""
    hits_NG = np.zeros((trace.num_tokens, placement.ep_size))
    for layer in range(placement.num_layers):
        hits_NG += _hits(placement, trace, layer)
    scores_RG = np.zeros((trace.num_requests, placement.ep_size))
    np.add.at(scores_RG, trace.request_of_token, hits_NG)
    rank_R: np.ndarray = assign_in_windows(
        scores_RG, np.diff(trace.offsets), window=WINDOW_REQUESTS
    )
    home_N: np.ndarray = rank_R[trace.request_of_token]
    return home_N


def _tokens_if_known(placement: Placement, trace: RoutingTrace) -> np.ndarray:
    """[N, L] ranks of tokens chosen by their true activations, in equal slices."""
    layers = range(placement.num_layers)
    homes = [
        slices_in_batches(_hits(placement, trace, layer), batch=BATCH_TOKENS) for layer in layers
    ]
    return np.stack(homes, axis=1)


def _hits(placement: Placement, trace: RoutingTrace, layer: int) -> np.ndarray:
    """[N, G] float64, activations of each token that each rank could compute."""
    hits: np.ndarray = placement.expert_on_rank[layer][trace.experts[:, layer]].sum(
        axis=1, dtype=np.float64
    )
    return hits
