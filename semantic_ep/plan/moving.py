"""Change a placement while moving as few experts as possible.

Ranks of a solver's answer are exchangeable as long as the links between them are: which rank holds
which group of experts is free within a node, and so are whole nodes. The relabelling that leaves
most experts where they are is a linear assignment (Hungarian method), solved for each layer.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from semantic_ep.errors import PlacementError, explain
from semantic_ep.plan.assignment import match_parts
from semantic_ep.plan.placement import Placement
from semantic_ep.topology import Topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moves:
    """What changing from one placement to another sends.

    Attributes:
        copies: [L] int64, expert copies that a rank must receive.
        from_other_node: [L] int64, those of them that no rank of the receiver's node holds.
        bytes: Bytes that all ranks together receive.
        bytes_of_busiest_rank: Bytes that the rank which receives most receives.
    """

    copies: np.ndarray
    from_other_node: np.ndarray
    bytes: int
    bytes_of_busiest_rank: int


def relabel_ranks(
    wanted: Placement,
    current: Placement,
    *,
    shared_ranks: bool = False,
    topology: Topology | None = None,
) -> Placement:
    """Rename the ranks of `wanted`, and order its slots, so that most experts stay put.

    Args:
        wanted: The new placement.
        current: The placement in force, of the same model and ranks.
        shared_ranks: Rename the ranks of all layers alike, as a schedule of whole requests needs,
            whose home rank is one for all layers. The schedule's ranks must then be renamed too:
            see `rank_names`.
        topology: Nodes of the ranks; experts that share a node stay together. None: one node.

    Returns:
        A placement of equal cost. A slot that both placements fill with one expert keeps it.

    Raises:
        PlacementError: The placements are of different models or ranks.
    """
    names = rank_names(wanted, current, shared_ranks=shared_ranks, topology=topology)
    slots = wanted.physical_to_logical_map.reshape(wanted.num_layers, wanted.ep_size, -1)
    renamed = np.take_along_axis(slots, names.argsort(axis=1)[:, :, None], axis=1)
    if wanted.slots_per_rank == current.slots_per_rank:
        held = current.physical_to_logical_map.reshape(renamed.shape)
        renamed = np.stack(
            [
                np.stack([keep_slots(new, old) for new, old in zip(*layer)])
                for layer in zip(renamed, held)
            ]
        )
    return Placement(
        physical_to_logical_map=renamed.reshape(wanted.num_layers, -1),
        num_experts=wanted.num_experts,
        ep_size=wanted.ep_size,
    )


def rank_names(
    wanted: Placement,
    current: Placement,
    *,
    shared_ranks: bool = False,
    topology: Topology | None = None,
) -> np.ndarray:
    """[L, G] int64, the rank that takes over what `wanted` puts on rank g.

    See `relabel_ranks` for arguments and errors.
    """
    check_alike(wanted, current)
    ranks = wanted.ep_size
    nodes = np.zeros(ranks, dtype=np.int64) if topology is None else topology.nodes
    overlap = np.einsum(
        "leg,leh->lgh",
        wanted.expert_on_rank.astype(np.int64),
        current.expert_on_rank.astype(np.int64),
    )
    if shared_ranks:
        names = _match_within_nodes(overlap.sum(axis=0), nodes)
        return np.tile(names, (wanted.num_layers, 1))
    return np.stack([_match_within_nodes(layer, nodes) for layer in overlap])


def count_moves(
    wanted: Placement,
    current: Placement,
    *,
    bytes_per_expert: int,
    topology: Topology | None = None,
) -> Moves:
    """Count what ranks must receive to change from `current` to `wanted`.

    Args:
        wanted: The new placement.
        current: The placement in force.
        bytes_per_expert: Weights of one expert of one layer; with optimiser state when training.
        topology: Nodes of the ranks; None means one node.

    Raises:
        PlacementError: The placements are of different models or ranks.
    """
    check_alike(wanted, current)
    arriving = wanted.expert_on_rank & ~current.expert_on_rank  # [L, E, G]
    nodes = np.zeros(wanted.ep_size, dtype=np.int64) if topology is None else topology.nodes
    members = [nodes == node for node in range(nodes.max() + 1)]
    on_node = np.stack(
        [current.expert_on_rank[:, :, ranks].any(axis=2) for ranks in members], axis=2
    )
    return Moves(
        copies=arriving.sum(axis=(1, 2)),
        from_other_node=(arriving & ~on_node[:, :, nodes]).sum(axis=(1, 2)),
        bytes=int(arriving.sum()) * bytes_per_expert,
        bytes_of_busiest_rank=int(arriving.sum(axis=(0, 1)).max()) * bytes_per_expert,
    )


def _match_within_nodes(overlap_GG: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """[G] new name of each rank: nodes are matched whole, then the ranks inside them."""
    members = [np.flatnonzero(nodes == node) for node in range(nodes.max() + 1)]
    inside = {}
    gain = np.full((len(members), len(members)), -1.0)
    for a, ours in enumerate(members):
        for b, theirs in enumerate(members):
            if len(ours) == len(theirs):  # only nodes of equal size can stand for each other
                block = overlap_GG[np.ix_(ours, theirs)]
                part_of_place = match_parts(block)
                inside[a, b] = part_of_place
                gain[a, b] = block[part_of_place, np.arange(len(theirs))].sum()
    # A node always fits itself, so a matching without the forbidden pairs exists.
    forbidden = -1.0 - overlap_GG.sum()
    node_of_place = match_parts(np.where(gain < 0, forbidden, gain))
    names = np.empty(len(nodes), dtype=np.int64)
    for place, part in enumerate(node_of_place):
        names[members[part][inside[int(part), place]]] = members[place]
    return names


def keep_slots(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """[S] `new` in an order that leaves experts which `old` holds too in their slots."""
    kept = np.where(np.isin(old, new) & (old >= 0), old, -2)
    rest = iter([expert for expert in new if expert < 0 or expert not in kept])
    return np.array([next(rest) if slot == -2 else slot for slot in kept])


def check_alike(wanted: Placement, current: Placement) -> None:
    """Raise `PlacementError` unless both are of one model and as many ranks."""
    shapes = [(p.num_layers, p.num_experts, p.ep_size) for p in (wanted, current)]
    if shapes[0] != shapes[1]:
        raise PlacementError(
            explain(
                "the placements are of different models or ranks",
                got=f"(layers, experts, ranks) {shapes[0]} and {shapes[1]}",
                do="Compare placements of one model on the same EP size",
            )
        )
