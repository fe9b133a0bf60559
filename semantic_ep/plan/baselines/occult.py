"""Occult: grow clusters of experts that are activated together."""

from __future__ import annotations

import numpy as np

from semantic_ep.plan.baselines.simple import contiguous_placement
from semantic_ep.plan.placement import Placement


def occult_placement(coactivation: np.ndarray, *, ep_size: int) -> Placement:
    """Place each layer by greedy growth on its collaboration graph.

    Args:
        coactivation: [L, E, E] tokens that activate both experts; zero diagonal.
        ep_size: EP ranks (G), which divides E.
    """
    layers, experts, _ = coactivation.shape
    contiguous_placement(num_layers=1, num_experts=experts, ep_size=ep_size)
    ranks = [grow_clusters(coactivation[layer], ep_size) for layer in range(layers)]
    return Placement.from_rank_of_expert(np.stack(ranks), ep_size=ep_size)


def grow_clusters(weight_EE: np.ndarray, num_clusters: int) -> np.ndarray:
    """[E] cluster of each expert, in clusters of equal size.

    A cluster starts from the free expert with most weight to other free experts, then takes the
    free expert with most weight to its members, until it is full.
    """
    experts = len(weight_EE)
    size = experts // num_clusters
    cluster = np.full(experts, -1)
    for number in range(num_clusters):
        free = cluster < 0
        pull = np.where(free, weight_EE[:, free].sum(axis=1), -np.inf)
        joined = int(pull.argmax())
        inside = np.zeros(experts)
        for _ in range(size):
            cluster[joined] = number
            inside += weight_EE[:, joined]
            joined = int(np.where(cluster < 0, inside, -np.inf).argmax())
    return cluster
