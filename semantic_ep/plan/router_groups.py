"""Router groups: placements that a checkpoint can carry although its router picks by groups.

A group-limited router (DeepSeek-V2 and V3) keeps the best of N groups of neighbouring experts
before it picks experts. A checkpoint with its experts in another order routes alike only if every
block of E / N neighbouring slots holds one whole group. On G ranks that means: whole groups on each
rank where G divides N, else a group on a block of G / N neighbouring ranks. Runtimes that remap ids
after the router are free of this.
"""

from __future__ import annotations

import numpy as np

from semantic_ep.errors import PlacementError, explain
from semantic_ep.plan.baselines.simple import greedy_load_placement


def check_router_groups(num_groups: int, *, num_experts: int, ep_size: int) -> None:
    """Refuse router groups that cannot be laid on ranks as blocks.

    Raises:
        PlacementError: Groups do not divide experts, or neither groups nor ranks the other.
    """
    where = "--router-groups"
    if num_groups < 1 or num_experts % num_groups:
        raise PlacementError(
            explain(
                f"router groups must divide the {num_experts} experts of a layer",
                where=where,
                got=num_groups,
                allowed=[n for n in range(1, num_experts + 1) if num_experts % n == 0],
            )
        )
    if not nested(num_groups, ep_size):
        raise PlacementError(
            explain(
                f"no block of ranks holds whole router groups on {ep_size} ranks",
                where=where,
                got=num_groups,
                allowed=f"divisors and multiples of --ep-size {ep_size}",
                do="Plan for another number of ranks, or serve the plan inside an integration, "
                "which needs no router groups",
            )
        )


def nested(one: int, other: int) -> bool:
    """Whether one of two partitions of neighbours refines the other."""
    return one % other == 0 or other % one == 0


def mixed_blocks(physical_to_logical_map: np.ndarray, num_groups: int) -> np.ndarray:
    """[n, 2] (layer, block) of the blocks of slots that mix router groups.

    Args:
        physical_to_logical_map: [L, E] logical expert of each slot, each once.
        num_groups: Router groups (N), which divides E.
    """
    size = physical_to_logical_map.shape[1] // num_groups
    group_LNS = physical_to_logical_map.reshape(-1, num_groups, size) // size
    return np.argwhere((group_LNS != group_LNS[:, :, :1]).any(axis=2))


def balanced_ranks(load_LE: np.ndarray, *, ep_size: int, num_groups: int) -> np.ndarray:
    """[L, E] ranks of levelled load that keep router groups: a start for a search.

    Args:
        load_LE: [L, E] load of each expert.
        ep_size: EP ranks (G).
        num_groups: Router groups (N); 1 for a router without any.
    """
    layers, experts = load_LE.shape
    parts = load_LE.reshape(layers, num_groups, -1)
    if num_groups > 1 and ep_size <= num_groups:
        ranks = greedy_load_placement(parts.sum(axis=2), ep_size=ep_size).rank_of_expert
        return np.repeat(ranks, experts // num_groups, axis=1)
    block = ep_size // num_groups
    inside = [
        greedy_load_placement(parts[:, group], ep_size=block).rank_of_expert + group * block
        for group in range(num_groups)
    ]
    return np.concatenate(inside, axis=1)
