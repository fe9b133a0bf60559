"""Re-planning a training run: would another placement pay for moving the experts?

In training no schedule sends sequences to the ranks of their experts: data loaders deal them out
blindly. What a placement saves there are remote copies alone, by keeping experts together that are
activated together.

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
from semantic_ep.plan.verdict import home_ranks
from semantic_ep.topology import Topology

POLICY = "semantic-requests"

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
        time_limit: Seconds for the solver.

    Raises:
        PlacementError: Ranks cannot have equally many experts.
    """
    if window.num_requests < MIN_SEQUENCES:
        reason = (
            f"not judged: {window.num_requests} whole sequences since the last decision, of "
            f"{MIN_SEQUENCES} needed"
        )
        return Proposal(placement=None, report={"reason": reason})
    wanted = policy(POLICY).place(
        earlier, ep_size=current.ep_size, time_limit=time_limit, topology=topology
    )
    wanted = relabel_ranks(_in_slots(wanted, current), current, topology=topology)
    home = home_ranks(window, current, None, "requests")
    before, after = (evaluate(p, window, home, topology=topology) for p in (current, wanted))
    effect = effect_on_time(
        before,
        after,
        current,
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
    pays = break_even is not None and break_even <= horizon_tokens and low > 0
    return Proposal(
        placement=wanted if pays else None,
        report={
            "judged_on_tokens": window.num_tokens,
            "remote_copies": [before.mean()["remote_copies"], after.mean()["remote_copies"]],
            "saved_interval_95": [low, high],
            "bytes_to_move": effect["bytes_to_move"],
            "break_even_tokens": break_even,
            "horizon_tokens": horizon_tokens,
            "reason": _reason(effect, low, horizon_tokens),
        },
    )


def _reason(effect: Mapping[str, Any], low: float, horizon_tokens: float) -> str:
    break_even = effect["break_even_tokens"]
    if effect["bytes_to_move"] == 0:
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
