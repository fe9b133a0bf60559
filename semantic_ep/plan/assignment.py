"""Assignment of experts to ranks with exact counts, as a linear assignment problem."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment


def assign_experts(gain_GE: np.ndarray) -> np.ndarray:
    """Give each expert a rank so that total gain is largest and ranks hold equally many.

    Args:
        gain_GE: [G, E] gain of an expert on a rank; G divides E.

    Returns:
        [E] int64 rank of each expert, E / G on each rank.
    """
    ranks, experts = gain_GE.shape
    slots = experts // ranks
    rows, columns = linear_sum_assignment(-np.repeat(gain_GE, slots, axis=0))
    rank_E = np.empty(experts, dtype=np.int64)
    rank_E[columns] = rows // slots
    return rank_E


def assign_in_groups(gain_GE: np.ndarray, num_groups: int) -> np.ndarray:
    """As `assign_experts`, each group of neighbouring experts on a block of neighbouring ranks.

    Args:
        gain_GE: [G, E] gain of an expert on a rank; G divides E.
        num_groups: Groups and blocks; divides G.
    """
    ranks, experts = gain_GE.shape
    parts = gain_GE.reshape(num_groups, ranks // num_groups, num_groups, experts // num_groups)
    inside = np.array([[assign_experts(part) for part in block.swapaxes(0, 1)] for block in parts])
    gained = np.take_along_axis(parts, inside[:, None], axis=1).sum(axis=(1, 3))
    block_of_group = match_parts(gained)
    own = inside[block_of_group, np.arange(num_groups)]
    return np.asarray(own + block_of_group[:, None] * (ranks // num_groups)).ravel()


def match_parts(overlap_GG: np.ndarray) -> np.ndarray:
    """[G] int64, the part that each column's place takes, with the largest total overlap.

    Args:
        overlap_GG: [G, G] overlap of part i with place j.
    """
    parts, places = linear_sum_assignment(-overlap_GG)
    part_of_place = np.empty(len(places), dtype=np.int64)
    part_of_place[places] = parts
    return part_of_place
