"""The ablation of the scale theme: what placement, schedule and copies each bring."""

from __future__ import annotations

import numpy as np

from benchmarks.scale_cost import Counted, count
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.policies import policy
from semantic_ep.plan.replicas import add_replicas
from semantic_ep.plan.requests import assign_in_windows
from semantic_ep.plan.schedule import Schedule
from semantic_ep.topology import Topology

# Variant -> what is counted, and how rows are sent (`scale_cost.seconds`).
VARIANTS = {
    "a row a route": ("contiguous", "routes"),
    "contiguous": ("contiguous", "ranks"),
    "contiguous, forwarded": ("contiguous", "forwarded"),
    "placement": ("placement", "ranks"),
    "schedule": ("schedule", "ranks"),
    "placement + schedule": ("placement + schedule", "ranks"),
    "placement + schedule, forwarded": ("placement + schedule", "forwarded"),
    "+ a spare slot a rank": ("copies", "ranks"),
}
# Above this, filling slots one by one takes minutes.
LARGEST_EP_WITH_COPIES = 32
_REQUESTS_A_RANK = 8


def counted_variants(trace: RoutingTrace, topology: Topology, *, seed: int) -> dict[str, Counted]:
    """Plan on half of the requests and count the other half, for each part of a plan.

    Args:
        trace: Routing of the model.
        topology: Ranks of one EP group on their nodes; links are not looked at.
        seed: Seed of the split and of the planner.

    Returns:
        By name; "copies" is left out above `LARGEST_EP_WITH_COPIES` ranks.
    """
    profiled, rest = trace.split(0.5, seed=seed)
    vocab = int(trace.token_id.max()) + 1
    profile = RoutingProfile.from_trace(profiled, vocab_size=vocab)
    shape, ep_size = trace.fingerprint, topology.ep_size
    contiguous = Placement.contiguous(
        num_layers=shape.num_layers, num_experts=shape.num_experts, ep_size=ep_size
    )
    semantic = policy("semantic-requests").place(
        profile, ep_size=ep_size, seed=seed, topology=topology
    )
    wanted = {
        "contiguous": (contiguous, False),
        "placement": (semantic, False),
        "schedule": (contiguous, True),
        "placement + schedule": (semantic, True),
    }
    if ep_size <= min(LARGEST_EP_WITH_COPIES, shape.num_experts - 1):
        copies = add_replicas(semantic, profile, slots_per_rank=1, topology=topology)
        wanted["copies"] = (copies, True)
    return {
        name: count(
            placement, rest, _home_ranks(rest, placement, profile if by_score else None), topology
        )
        for name, (placement, by_score) in wanted.items()
    }


def _home_ranks(
    trace: RoutingTrace, placement: Placement, profile: RoutingProfile | None
) -> np.ndarray:
    """[N] rank of each token's request, in windows large enough for every rank."""
    scores = np.zeros((trace.num_requests, placement.ep_size))
    if profile is not None:
        schedule = Schedule.from_profile(profile, placement)
        bounds = zip(trace.offsets[:-1], trace.offsets[1:], strict=True)
        scores = np.stack([schedule.request_score(trace.token_id[a:b]) for a, b in bounds])
    window = max(64, _REQUESTS_A_RANK * placement.ep_size)
    rank_R = assign_in_windows(scores, np.diff(trace.offsets), window=window)
    return np.asarray(rank_R[trace.request_of_token])
