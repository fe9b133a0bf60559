"""How far a plan is from the least and the most that home ranks can do, and how sure that is."""

from __future__ import annotations

import numpy as np

from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.cost import evaluate
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.requests import assign_in_windows
from semantic_ep.plan.slices import BATCH_TOKENS, slices_in_batches

_DRAWS = 1000


def bounds(placement: Placement, trace: RoutingTrace, mode: str) -> dict[str, float]:
    """Floor and ceiling of a placement's LAR and remote copies on a trace.

    The floor is a home rank chosen blindly. The ceiling is the home that knows the true routes,
    under the same equal slices or windows; no predictor can pass it on this placement.
    """
    ceiling = evaluate(placement, trace, oracle_home_ranks(placement, trace, mode)).mean()
    return {
        "floor_lar": 1 / placement.ep_size,
        "ceiling_lar": ceiling["lar"],
        "ceiling_remote_copies": ceiling["remote_copies"],
    }


def oracle_home_ranks(placement: Placement, trace: RoutingTrace, mode: str) -> np.ndarray:
    """Home ranks of most local activations, knowing the routes: [N] for requests, else [N, L]."""
    layers, ranks = placement.num_layers, placement.ep_size
    held = placement.expert_on_rank.astype(np.float32)
    if mode == "tokens":
        homes = [
            slices_in_batches(held[layer][trace.experts[:, layer]].sum(axis=1), batch=BATCH_TOKENS)
            for layer in range(layers)
        ]
        return np.stack(homes, axis=1)
    local = np.zeros((trace.num_tokens, ranks))
    for layer in range(layers):
        local += held[layer][trace.experts[:, layer]].sum(axis=1)
    ends = np.concatenate([np.zeros((1, ranks)), np.cumsum(local, axis=0)])
    scores = ends[trace.offsets[1:]] - ends[trace.offsets[:-1]]
    rank_R = assign_in_windows(scores, np.diff(trace.offsets))
    return np.asarray(rank_R[trace.request_of_token])


def saving_interval(
    plain_N: np.ndarray, planned_N: np.ndarray, trace: RoutingTrace, *, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of the share of remote copies saved, resampling whole requests.

    Tokens of a request resemble each other, so requests are the units that vary.

    Args:
        plain_N: [N] remote copies of each token without the plan.
        planned_N: [N] the same with it.
        trace: The N tokens, for their requests.
        seed: Seed of the resampling.
    """
    owner = trace.request_of_token
    plain = np.bincount(owner, weights=plain_N, minlength=trace.num_requests)
    planned = np.bincount(owner, weights=planned_N, minlength=trace.num_requests)
    rng = np.random.default_rng(seed)
    share = np.full(trace.num_requests, 1 / trace.num_requests)
    drawn = rng.multinomial(trace.num_requests, share, size=_DRAWS)
    saved = 1 - (drawn @ planned) / np.maximum(drawn @ plain, 1e-12)
    low, high = np.quantile(saved, [0.025, 0.975])
    return float(low), float(high)
