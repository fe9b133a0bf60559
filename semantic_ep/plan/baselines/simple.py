"""Placements that need no solver: contiguous, random, and greedy by load."""

from __future__ import annotations

import numpy as np

from semantic_ep.plan.baselines.eplb import balanced_packing
from semantic_ep.plan.placement import Placement


def contiguous_placement(*, num_layers: int, num_experts: int, ep_size: int) -> Placement:
    """What every upstream runtime does: rank g holds experts g * E/G .. (g + 1) * E/G - 1."""
    return Placement.contiguous(num_layers=num_layers, num_experts=num_experts, ep_size=ep_size)


def random_placement(
    *, num_layers: int, num_experts: int, ep_size: int, seed: int = 0
) -> Placement:
    """Experts dealt at random, each layer by itself, E/G to a rank."""
    start = Placement.contiguous(num_layers=num_layers, num_experts=num_experts, ep_size=ep_size)
    shuffled = np.random.default_rng(seed).permuted(start.physical_to_logical_map, axis=1)
    return Placement(physical_to_logical_map=shuffled, num_experts=num_experts, ep_size=ep_size)


def greedy_load_placement(load: np.ndarray, *, ep_size: int) -> Placement:
    """Heaviest expert first, each to the least-loaded rank with room.

    The rule of SmartMoE and MindSpeed; EPLB without spare slots is the same rule.

    Args:
        load: [L, E] load of each expert; `ep_size` divides E.
        ep_size: EP ranks (G).
    """
    # Refuses an ep_size that does not divide E with the message that names the setting.
    contiguous_placement(num_layers=1, num_experts=load.shape[1], ep_size=ep_size)
    rank, _ = balanced_packing(np.asarray(load, dtype=np.float64), ep_size)
    return Placement.from_rank_of_expert(rank, ep_size=ep_size)
