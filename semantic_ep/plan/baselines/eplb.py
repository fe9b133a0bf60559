"""EPLB: DeepSeek's expert-parallel load balancer, from its published description.

Three greedy steps, here vectorised over layers: groups of experts to nodes, copies for the hottest
experts of a node, copies to ranks. It balances load and knows nothing of traffic. Ties go to the
lowest index, so a result is a function of the load alone.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from semantic_ep.errors import PlacementError, explain
from semantic_ep.plan.placement import Placement


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotMaps:
    """EPLB's answer; unlike a `Placement` it may hold two copies of an expert on one rank.

    Attributes:
        physical_to_logical_map: [L, slots] int64.
        logical_to_physical_map: [L, E, copies] int64, in order of replication, padded with -1.
        logical_count: [L, E] int64.
    """

    physical_to_logical_map: np.ndarray
    logical_to_physical_map: np.ndarray
    logical_count: np.ndarray


def balanced_packing(weight: np.ndarray, num_packs: int) -> tuple[np.ndarray, np.ndarray]:
    """Deal items to packs of equal size, heaviest first, each to the lightest pack with room.

    Args:
        weight: [B, n], B independent problems of n items; `num_packs` divides n.
        num_packs: Packs a problem has.

    Returns:
        ([B, n] pack of each item, [B, n] position of each item in its pack).
    """
    batch, items = weight.shape
    room = items // num_packs
    if room == 1:
        pack = np.broadcast_to(np.arange(items), weight.shape).copy()
        return pack, np.zeros_like(pack)
    order = np.argsort(-weight, axis=1, kind="stable")
    pack = np.empty((batch, items), dtype=np.int64)
    position = np.empty_like(pack)
    filled = np.zeros((batch, num_packs), dtype=np.int64)
    total = np.zeros((batch, num_packs))
    rows = np.arange(batch)
    for item in order.T:
        lightest = np.where(filled < room, total, np.inf).argmin(axis=1)
        pack[rows, item] = lightest
        position[rows, item] = filled[rows, lightest]
        filled[rows, lightest] += 1
        total[rows, lightest] += weight[rows, item]
    return pack, position


def replicate_experts(
    load: np.ndarray, num_slots: int, *, max_copies: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give each slot beyond the first E to the expert whose copies are busiest.

    This greedy minimises the largest load of a copy.

    Args:
        load: [B, E] load of each expert, split evenly over its copies.
        num_slots: Copies in all, at least E.
        max_copies: Most copies of one expert; the published rule has no such limit.

    Returns:
        ([B, num_slots] expert of each copy, [B, num_slots] its index among that expert's copies,
        [B, E] copies of each expert).
    """
    batch, experts = load.shape
    expert_of = np.tile(np.arange(num_slots), (batch, 1))
    copy_index = np.zeros((batch, num_slots), dtype=np.int64)
    copies = np.ones((batch, experts), dtype=np.int64)
    rows = np.arange(batch)
    for slot in range(experts, num_slots):
        share = load / copies
        if max_copies is not None:
            share = np.where(copies < max_copies, share, -np.inf)
        busiest = share.argmax(axis=1)
        expert_of[:, slot] = busiest
        copy_index[:, slot] = copies[rows, busiest]
        copies[rows, busiest] += 1
    return expert_of, copy_index, copies


def rebalance_experts(
    load: np.ndarray,
    num_slots: int,
    *,
    ep_size: int,
    num_groups: int = 1,
    num_nodes: int = 1,
    cap_copies: bool = False,
) -> SlotMaps:
    """Place E experts and their copies in `num_slots` slots of `ep_size` ranks.

    Hierarchical where `num_nodes` divides `num_groups`: a group of experts stays on one node.
    Otherwise global, over all ranks at once.

    Args:
        load: [L, E] load of each expert.
        num_slots: Slots of a layer over all ranks; a multiple of `ep_size`, at least E.
        ep_size: EP ranks (G).
        num_groups: Groups of consecutive experts that the router limits itself to.
        num_nodes: Nodes that the ranks are spread over.
        cap_copies: Give an expert no more copies than it has ranks to be on. Published EPLB does
            not cap, and then wastes slots on copies that share a rank.

    Raises:
        PlacementError: The counts do not divide, or capped copies cannot fill the slots.
    """
    load = np.asarray(load, dtype=np.float64)
    layers, experts = load.shape
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    _check_counts(experts, num_slots, ep_size, num_groups, num_nodes)
    group_size, node_experts = experts // num_groups, experts // num_nodes
    node_slots, node_ranks = num_slots // num_nodes, ep_size // num_nodes
    if cap_copies and node_slots > node_experts * node_ranks:
        raise PlacementError(
            explain(
                f"a rank of a node with {node_experts} experts has no use for more slots than that",
                where="plan.redundant_slots (--redundant-slots)",
                got=f"{num_slots - experts} slots beyond one an expert",
                allowed=f"0..{experts * (node_ranks - 1)}: a copy of every expert of the node on "
                f"each of its {node_ranks} ranks",
            )
        )

    # Step 1: groups to nodes. `gathered` lists the logical experts node by node.
    group_load = load.reshape(layers, num_groups, group_size).sum(axis=2)
    node, within = balanced_packing(group_load, num_nodes)
    new_index = (node * (num_groups // num_nodes) + within)[:, :, None] * group_size + np.arange(
        group_size
    )
    gathered = np.argsort(new_index.reshape(layers, experts), axis=1)

    # Step 2: copies inside each node; from here a row is one node of one layer.
    node_load = np.take_along_axis(load, gathered, axis=1).reshape(-1, node_experts)
    expert_of, copy_index, copies = replicate_experts(
        node_load, node_slots, max_copies=node_ranks if cap_copies else None
    )

    # Step 3: copies to the ranks of the node.
    copy_load = np.take_along_axis(node_load / copies, expert_of, axis=1)
    rank, position = balanced_packing(copy_load, node_ranks)
    slot = rank * (node_slots // node_ranks) + position
    copy_in_slot = np.argsort(slot, axis=1)
    in_slot = np.take_along_axis(expert_of, copy_in_slot, axis=1).reshape(
        layers, num_nodes, node_slots
    )
    in_slot += np.arange(num_nodes)[:, None] * node_experts
    physical = np.take_along_axis(gathered, in_slot.reshape(layers, num_slots), axis=1)
    copy_of_slot = np.take_along_axis(copy_index, copy_in_slot, axis=1).reshape(layers, num_slots)
    count = np.zeros((layers, experts), dtype=np.int64)
    np.put_along_axis(count, gathered, copies.reshape(layers, experts), axis=1)
    logical = np.full((layers, experts, int(count.max())), -1, dtype=np.int64)
    logical[np.arange(layers)[:, None], physical, copy_of_slot] = np.arange(num_slots)
    return SlotMaps(
        physical_to_logical_map=physical, logical_to_physical_map=logical, logical_count=count
    )


def eplb_placement(
    load: np.ndarray,
    *,
    ep_size: int,
    redundant_slots: int = 0,
    num_groups: int = 1,
    num_nodes: int = 1,
) -> Placement:
    """EPLB as a `Placement`: a second copy on a rank, which helps nobody, moves inside its node.

    Args:
        load: [L, E] load of each expert.
        ep_size: EP ranks (G).
        redundant_slots: Slots beyond E, over all ranks.
        num_groups: Groups of consecutive experts that the router limits itself to.
        num_nodes: Nodes that the ranks are spread over.

    Raises:
        PlacementError: The counts do not divide, or there are more slots than copies to fill them
            with, one of an expert on a rank.
    """
    experts = load.shape[1]
    if num_groups % num_nodes:
        num_nodes = 1
    maps = rebalance_experts(
        load,
        experts + redundant_slots,
        ep_size=ep_size,
        num_groups=num_groups,
        num_nodes=num_nodes,
        cap_copies=True,
    )
    physical = maps.physical_to_logical_map
    copy_load = np.take_along_axis(load / maps.logical_count, physical, axis=1)
    separated = [
        separate_copies(slots, weight, num_ranks=ep_size // num_nodes)
        for slots, weight in zip(
            physical.reshape(len(load) * num_nodes, -1),
            copy_load.reshape(len(load) * num_nodes, -1),
        )
    ]
    return Placement(
        physical_to_logical_map=np.reshape(separated, physical.shape),
        num_experts=experts,
        ep_size=ep_size,
    )


def separate_copies(slots: np.ndarray, copy_load: np.ndarray, *, num_ranks: int) -> np.ndarray:
    """Swap slots until no rank holds two copies of one expert, changing load as little as possible.

    Each swap lowers the number of doubled copies, so this ends.

    Args:
        slots: [num_ranks * S] logical expert of each slot, at most `num_ranks` copies of each.
        copy_load: [num_ranks * S] load of each slot.
        num_ranks: Ranks among which slots may be swapped.
    """
    slots, copy_load = slots.copy(), copy_load.copy()
    assert np.bincount(slots).max() <= num_ranks, "more copies of an expert than ranks"
    rank = np.repeat(np.arange(num_ranks), len(slots) // num_ranks)
    while True:
        held = np.zeros((num_ranks, int(slots.max()) + 1), dtype=np.int64)
        np.add.at(held, (rank, slots), 1)
        doubled = np.flatnonzero(held[rank, slots] > 1)
        if not doubled.size:
            return slots
        first = doubled[0]
        elsewhere = held[rank, slots[first]] == 0
        partners = np.flatnonzero(elsewhere & (held[rank[first], slots] == 0))
        if not partners.size:  # those ranks hold only what this one has, hence doubles themselves
            partners = np.flatnonzero(elsewhere & (held[rank, slots] > 1))
        best = partners[np.abs(copy_load[partners] - copy_load[first]).argmin()]
        slots[[first, best]] = slots[[best, first]]
        copy_load[[first, best]] = copy_load[[best, first]]


def _check_counts(experts: int, slots: int, ranks: int, groups: int, nodes: int) -> None:
    for what, whole, part in (
        ("num_slots by ep_size", slots, ranks),
        ("num_experts by num_groups", experts, groups),
        ("ep_size by num_nodes", ranks, nodes),
    ):
        if whole % part:
            raise PlacementError(
                explain(
                    f"EPLB must divide {what}", got=f"{whole} / {part}", do="Change one of them"
                )
            )
    if slots < experts:
        raise PlacementError(
            explain("EPLB needs a slot for each expert", got=f"{slots} slots, {experts} experts")
        )
