"""How far a plan is from the least and the most that home ranks can do, and how sure that is."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.cost import evaluate
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.predictors import multihot
from semantic_ep.plan.requests import assign_in_windows
from semantic_ep.plan.samples import Evidence
from semantic_ep.plan.slices import BATCH_TOKENS, slices_in_batches
from semantic_ep.plan.solver import Mode, SemanticPolicy
from semantic_ep.topology import Topology

_DRAWS = 1000


def bounds(
    placement: Placement, trace: RoutingTrace, mode: Mode, *, known: Placement | None = None
) -> dict[str, Any]:
    """Floor and ceiling of a placement's LAR and remote copies on a trace.

    The floor is a home rank chosen blindly. The ceiling is the home that knows the true routes,
    under the same equal slices or windows; no predictor can pass it on this placement.

    Args:
        placement: The placement judged.
        trace: Requests to judge on.
        mode: What gets a home rank.
        known: A placement that knows the true routes (`oracle_placement`): the ceiling is then also
            that of placement and homes together.

    Returns:
        `floor_lar`, `ceiling_lar` and `ceiling_remote_copies`; `placement_ceiling_lar` and
        `placement_ceiling_remote_copies`, None without `known`.
    """
    ceiling = evaluate(placement, trace, oracle_home_ranks(placement, trace, mode)).mean()
    best: dict[str, float | None] = {"lar": None, "remote_copies": None}
    if known is not None:
        found = evaluate(known, trace, oracle_home_ranks(known, trace, mode)).mean()
        # What the plan itself reaches is possible too; each figure has its own best placement.
        best = {
            "lar": max(found["lar"], ceiling["lar"]),
            "remote_copies": min(found["remote_copies"], ceiling["remote_copies"]),
        }
    return {
        "floor_lar": 1 / placement.ep_size,
        "ceiling_lar": ceiling["lar"],
        "ceiling_remote_copies": ceiling["remote_copies"],
        "placement_ceiling_lar": best["lar"],
        "placement_ceiling_remote_copies": best["remote_copies"],
    }


def oracle_placement(
    policy: SemanticPolicy,
    trace: RoutingTrace,
    *,
    ep_size: int,
    seed: int = 0,
    time_limit: float | None = None,
    topology: Topology | None = None,
) -> Placement:
    """Plan on the very routes that a plan is judged on.

    The search is heuristic: this is what is known to be possible, not a proof of what is not.

    Args:
        policy: The solver as it plans otherwise; evidence is replaced by the true routes.
        trace: The requests judged on.
        ep_size: EP ranks (G).
        seed: See `PlacementPolicy.place`, as are the others.
        time_limit: Seconds.
        topology: Nodes of the ranks.
    """
    routes = Evidence(trace=trace, predictor=KnownRoutes(trace=trace))
    return dataclasses.replace(policy, evidence=routes).place(
        RoutingProfile.from_trace(trace),
        ep_size=ep_size,
        seed=seed,
        time_limit=time_limit,
        topology=topology,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownRoutes:
    """Predicts exactly what a trace did: an oracle.

    Attributes:
        trace: The trace.
        homes_count: False hides the routes from the choice of homes, so that a placement is planned
            for the ranks that tokens touch alone.
    """

    trace: RoutingTrace
    homes_count: bool = True

    def training_scores(self, trace: RoutingTrace, layer: int, rows: np.ndarray) -> np.ndarray:
        """[T, E] float32, 1 for the experts that tokens activate."""
        assert trace is self.trace
        hot = multihot(trace.experts[rows, layer], trace.fingerprint.num_experts)
        return hot if self.homes_count else np.zeros_like(hot)


def oracle_home_ranks(placement: Placement, trace: RoutingTrace, mode: Mode) -> np.ndarray:
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
