"""MoETuner: balanced clusters in each layer, then clusters to ranks along the layers.

Two integer programs in the paper, both for a commercial solver with a tolerance of 2.5 %. The first
asks for clusters of equal load; with exact counts, which it omits and any runtime needs, swaps from
a greedy start come closer to the mean than that. The second chooses which rank takes which cluster
in each layer, so that the busiest pair of ranks carries least; it is a chain, solved exactly by
dynamic programming over all G! orders for few ranks, and by swaps for more.

As with ExFlow, the second step pays only where tokens stay where their last expert was.
"""

from __future__ import annotations

import itertools
import time

import numpy as np

from semantic_ep.plan.assignment import match_parts
from semantic_ep.plan.baselines.eplb import balanced_packing
from semantic_ep.plan.baselines.simple import contiguous_placement
from semantic_ep.plan.placement import Placement
from semantic_ep.topology import Topology

_EXACT_RANKS = 4  # 24 orders a layer; 5! squared would take minutes
_SWEEPS = 20
_RANDOM_STARTS = 16
TOLERANCE = 0.025  # of the mean load


def moetuner_placement(
    load: np.ndarray,
    transition: np.ndarray,
    *,
    topology: Topology,
    time_limit: float | None = None,
) -> Placement:
    """Balance clusters, then map them to ranks.

    Args:
        load: [L, E] activations of each expert.
        transition: [L - 1, E, E] activation pairs (expert in layer l, expert in layer l + 1).
        topology: Ranks and links; `ep_size` divides E.
        time_limit: Seconds, after which clusters stay on the ranks they have been given.
    """
    deadline = None if time_limit is None else time.monotonic() + time_limit
    layers, experts = load.shape
    ep_size = topology.ep_size
    contiguous_placement(num_layers=1, num_experts=experts, ep_size=ep_size)
    cluster: np.ndarray = np.stack([balance_clusters(row, ep_size) for row in load])
    member = np.eye(ep_size)[cluster]  # [L, E, clusters]
    volume = np.stack(
        [member[i].T @ transition[i] @ member[i + 1] for i in range(layers - 1)]
    ) if layers > 1 else np.zeros((0, ep_size, ep_size))  # fmt: skip
    cluster_of_rank = map_clusters(volume, _cost_of_a_unit(topology), layers, deadline)
    rank_of_cluster = cluster_of_rank.argsort(axis=1)
    return Placement.from_rank_of_expert(
        np.take_along_axis(rank_of_cluster, cluster, axis=1), ep_size=ep_size
    )


def balance_clusters(load_E: np.ndarray, num_clusters: int) -> np.ndarray:
    """[E] cluster of each expert, equally many in each, with loads close to the mean.

    Minimises the sum over clusters of |load - mean| by swaps, from a greedy start and, until the
    paper's tolerance is reached, from a few random ones.
    """
    load_E = np.asarray(load_E, dtype=np.float64)
    rng = np.random.default_rng(0)
    best = _swap_until_level(load_E, balanced_packing(load_E[None], num_clusters)[0][0])
    for _ in range(_RANDOM_STARTS):
        if _deviation(load_E, best) <= TOLERANCE * load_E.sum() / num_clusters:
            break
        other = _swap_until_level(load_E, rng.permutation(best))
        if _deviation(load_E, other) < _deviation(load_E, best):
            best = other
    return best


def _deviation(load_E: np.ndarray, cluster_E: np.ndarray) -> float:
    total = np.bincount(cluster_E, weights=load_E)
    return float(np.abs(total - total.mean()).sum())


def _swap_until_level(load_E: np.ndarray, cluster_E: np.ndarray) -> np.ndarray:
    """[E] clusters after the best swap of two experts, again and again until none helps."""
    cluster = cluster_E.copy()
    total = np.bincount(cluster, weights=load_E)
    mean = float(total.mean())
    change = load_E[None, :] - load_E[:, None]  # the row's cluster gains this in a swap
    while True:
        off = total[cluster] - mean
        before = np.abs(off)[:, None] + np.abs(off)[None, :]
        after = np.abs(off[:, None] + change) + np.abs(off[None, :] - change)
        gain = np.where(cluster[:, None] != cluster[None, :], before - after, 0.0)
        first, second = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[first, second] <= 1e-9 * max(mean, 1e-12):
            return cluster
        total[cluster[first]] += change[first, second]
        total[cluster[second]] -= change[first, second]
        cluster[[first, second]] = cluster[[second, first]]


def map_clusters(
    volume: np.ndarray, unit_cost: np.ndarray, layers: int, deadline: float | None = None
) -> np.ndarray:
    """[L, G] cluster that each rank takes in each layer.

    Minimises the sum over layer boundaries of the costliest pair of ranks.

    Args:
        volume: [L - 1, G, G] pairs between cluster i of a layer and cluster j of the next.
        unit_cost: [G, G] cost of one unit between two ranks, 0 on the diagonal.
        layers: L.
        deadline: `time.monotonic()` after which no further swap is looked for.
    """
    ranks = len(unit_cost)
    if ranks <= _EXACT_RANKS:
        return _map_exactly(volume, unit_cost, layers)
    chosen = [np.arange(ranks)]
    for boundary in volume:  # start: keep as much as possible on its rank
        chosen.append(match_parts(boundary[chosen[-1]].T))
    orders = np.stack(chosen)
    pairs = np.array(list(itertools.combinations(range(ranks), 2)))
    for _ in range(_SWEEPS):
        improved = False
        for layer in range(layers):
            if deadline is not None and time.monotonic() > deadline:
                return orders
            improved |= _swap_best(orders, layer, pairs, volume, unit_cost)
        if not improved:
            break
    return orders


def bottleneck(
    volume: np.ndarray, unit_cost: np.ndarray, sending: np.ndarray, receiving: np.ndarray
) -> np.ndarray:
    """Cost of the costliest pair of ranks; orders are [..., G] clusters of the ranks."""
    between = volume[sending[..., :, None], receiving[..., None, :]]
    return np.asarray((between * unit_cost).max(axis=(-2, -1)))


def _map_exactly(volume: np.ndarray, unit_cost: np.ndarray, layers: int) -> np.ndarray:
    orders = np.array(list(itertools.permutations(range(len(unit_cost)))))
    best = np.zeros(len(orders))
    came_from = []
    for boundary in volume:
        cost = bottleneck(boundary, unit_cost, orders[:, None], orders[None])
        through = best[:, None] + cost
        came_from.append(through.argmin(axis=0))
        best = through.min(axis=0)
    chosen = [int(best.argmin())]
    for back in reversed(came_from):
        chosen.append(int(back[chosen[-1]]))
    assert len(chosen) == layers
    return np.asarray(orders[chosen[::-1]])


def _swap_best(
    orders: np.ndarray, layer: int, pairs: np.ndarray, volume: np.ndarray, unit_cost: np.ndarray
) -> bool:
    """Make the best swap of two ranks' clusters in one layer, in place; False if none helps."""
    options = np.repeat(orders[layer][None], len(pairs) + 1, axis=0)
    row = np.arange(len(pairs))
    options[row, pairs[:, 0]], options[row, pairs[:, 1]] = (
        orders[layer][pairs[:, 1]],
        orders[layer][pairs[:, 0]],
    )
    cost = np.zeros(len(options))  # the last option is to stay
    if layer > 0:
        cost += bottleneck(volume[layer - 1], unit_cost, orders[layer - 1][None], options)
    if layer < len(orders) - 1:
        cost += bottleneck(volume[layer], unit_cost, options, orders[layer + 1][None])
    best = int(cost.argmin())
    if cost[best] >= cost[-1] * (1 - 1e-12):
        return False
    orders[layer] = options[best]
    return True


def _cost_of_a_unit(topology: Topology) -> np.ndarray:
    """[G, G], inverse bandwidth between ranks; a rank reaches itself at no cost."""
    nodes = topology.nodes
    bandwidth = np.where(
        nodes[:, None] == nodes[None, :],
        topology.intra_node.gigabytes_per_second,
        topology.inter_node.gigabytes_per_second,
    )
    cost = 1.0 / bandwidth
    np.fill_diagonal(cost, 0.0)
    return cost
