"""Re-planning a training run: would another placement pay for moving the experts?

In training no schedule sends sequences to the ranks of their experts: data loaders deal them out
blindly. What a placement saves there are remote copies alone, by keeping experts together that are
activated together. Where the placement in force has copies of experts, a new one has as many slots
on each rank, and copies in those beyond an even share.

A candidate is planned on routing up to a point, and judged on routing after it. That is also how it
will be used: on weights that have moved on since.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.bounds import saving_interval
from semantic_ep.plan.cost import evaluate, remote_copies_by_token
from semantic_ep.plan.effect import Workload, effect_on_time
from semantic_ep.plan.moving import relabel_ranks
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.policies import policy
from semantic_ep.plan.replicas import add_replicas
from semantic_ep.plan.verdict import home_ranks
from semantic_ep.topology import Topology

POLICY = "semantic-requests"

# To choose copies: each entry of the token tables is looked at once for every pair of ranks and
# spare slot, which takes this long on one core.
SECONDS_AN_ENTRY = 1e-8

# The interval of a saving means nothing over a handful of sequences.
MIN_SEQUENCES = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposal:
    """A placement to change to, or why not.

    Attributes:
        placement: The new one, its ranks named and its slots ordered so that fewest experts move;
            None to keep the one in force.
        report: JSON-serialisable account; "reason" is one sentence.
    """

    placement: Placement | None
    report: Mapping[str, Any]


def propose(
    earlier: RoutingProfile,
    window: RoutingTrace,
    current: Placement,
    *,
    topology: Topology,
    row_bytes: int,
    expert_bytes: int,
    horizon_tokens: float,
    sources: Placement | None = None,
    time_limit: float | None = None,
) -> Proposal:
    """Plan on `earlier`, and propose the plan if it pays on `window`.

    It pays if the move takes less time on the links than is saved within the horizon, and the
    saving is none of chance: the lower end of its 95 % interval over sequences is above zero.

    Args:
        earlier: Counts up to the window.
        window: Sequences trained on since.
        current: The placement in force.
        topology: Nodes and links of the EP group.
        row_bytes: Bytes of one token's hidden vector.
        expert_bytes: Bytes of one expert in one layer, optimizer state included.
        horizon_tokens: Trained tokens within which the move must pay.
        sources: The slots of `current` that hold their experts with optimizer state, from which all
            others are filled when experts move; None: all that are not empty.
        time_limit: Seconds for the solver, and about as many for the choice of copies, which looks
            at as many of the most frequent token ids as they allow; None: no limit.

    Raises:
        PlacementError: Ranks cannot have equally many experts.
    """
    if window.num_requests < MIN_SEQUENCES:
        reason = (
            f"not judged: {window.num_requests} whole sequences since the last decision, of "
            f"{MIN_SEQUENCES} needed"
        )
        return Proposal(placement=None, report={"reason": reason})
    sources = current if sources is None else sources
    wanted = policy(POLICY).place(
        earlier, ep_size=current.ep_size, time_limit=time_limit, topology=topology
    )
    if current.has_replicas:
        wanted = _with_copies(wanted, earlier, current, topology, time_limit)
    wanted = relabel_ranks(_in_slots(wanted, current), sources, topology=topology)
    home = home_ranks(window, current, None, "requests")
    before, after = (evaluate(p, window, home, topology=topology) for p in (current, wanted))
    effect = effect_on_time(
        before,
        after,
        sources,
        wanted,
        topology=topology,
        # The backward pass sends as many rows as the forward pass.
        workload=Workload(row_bytes=2 * row_bytes, expert_bytes=expert_bytes),
    )
    plain, planned = (
        remote_copies_by_token(p, window, home, topology=topology) for p in (current, wanted)
    )
    low, high = saving_interval(plain, planned, window)
    break_even = effect["break_even_tokens"]
    in_force = np.array_equal(wanted.expert_on_rank, current.expert_on_rank)
    pays = not in_force and break_even is not None and break_even <= horizon_tokens and low > 0
    return Proposal(
        placement=wanted if pays else None,
        report={
            "judged_on_tokens": window.num_tokens,
            "remote_copies": [before.mean()["remote_copies"], after.mean()["remote_copies"]],
            "saved_interval_95": [low, high],
            "bytes_to_move": effect["bytes_to_move"],
            "break_even_tokens": break_even,
            "horizon_tokens": horizon_tokens,
            "reason": _reason(effect, low, horizon_tokens, in_force=in_force),
        },
    )


def _reason(effect: Mapping[str, Any], low: float, horizon_tokens: float, *, in_force: bool) -> str:
    break_even = effect["break_even_tokens"]
    if in_force:
        return "does not pay: the new plan is the one in force"
    if break_even is None:
        return "does not pay: the busiest rank would gain nothing"
    moving = (
        f"moving {effect['bytes_to_move'] / 1e6:,.1f} MB pays after {break_even:,.0f} tokens, and "
        f"{horizon_tokens:,.0f} are the horizon"
    )
    if break_even > horizon_tokens:
        return f"does not pay: {moving}"
    if low <= 0:
        return f"does not pay: the saving may be chance ({moving})"
    return f"pays: {moving}"


def _with_copies(
    wanted: Placement,
    profile: RoutingProfile,
    current: Placement,
    topology: Topology,
    time_limit: float | None,
) -> Placement:
    """The placement with copies in the slots that the one in force has besides."""
    spare = current.slots_per_rank - wanted.slots_per_rank
    spare = min(spare, wanted.num_experts - wanted.slots_per_rank)
    if time_limit is not None:
        pairs = wanted.ep_size**2 * (1 + spare)
        profile = _most_frequent(profile, time_limit / (pairs * SECONDS_AN_ENTRY))
    return add_replicas(
        wanted,
        profile,
        slots_per_rank=spare,
        topology=topology,
        scheduled=0.0,  # Any rank trains any sequence.
    )


def _most_frequent(profile: RoutingProfile, entries: float) -> RoutingProfile:
    """The profile with the most frequent token ids, as far as their tables have few entries."""
    entries_V = sum(np.diff(table.indptr) for table in profile.token_expert)
    order = np.argsort(-profile.token_count, kind="stable")
    left_out = order[np.cumsum(entries_V[order]) > entries]
    count_V = profile.token_count.copy()
    count_V[left_out] = 0
    return dataclasses.replace(profile, token_count=count_V)


def _in_slots(wanted: Placement, current: Placement) -> Placement:
    """The placement with the slots of the one in force, which a running model has."""
    spare = current.slots_per_rank - wanted.slots_per_rank
    assert spare >= 0, "no policy spreads experts more evenly than this one"
    slots = wanted.physical_to_logical_map.reshape(wanted.num_layers, wanted.ep_size, -1)
    padded = np.pad(slots, ((0, 0), (0, 0), (0, spare)), constant_values=-1)
    return Placement(
        physical_to_logical_map=padded.reshape(wanted.num_layers, -1),
        num_experts=wanted.num_experts,
        ep_size=wanted.ep_size,
    )
