"""GRACE-MoE: spectral groups of co-activated experts, of nearly equal size, and hot copies.

Groups come from spectral clustering of the co-activation matrix, with free sizes across nodes and
sizes within a share r of the mean inside a node; r = 0.15 is the paper's knee. Ranks may then hold
different numbers of experts, which the large training runtimes do not support. Copies of the
hottest experts go to the least loaded ranks. Which copy serves a token is decided as everywhere
here: the one on its rank, else on its node, else any, which is the paper's order too.
"""

from __future__ import annotations

import numpy as np
from scipy.cluster.vq import ClusterError, kmeans2

from semantic_ep.plan.baselines.simple import contiguous_placement
from semantic_ep.plan.placement import Placement
from semantic_ep.topology import Topology

SIZE_SLACK = 0.15


def grace_placement(
    coactivation: np.ndarray,
    load: np.ndarray,
    *,
    topology: Topology,
    seed: int = 0,
    replicate: bool = False,
) -> Placement:
    """Group experts, and copy the hottest if asked.

    Args:
        coactivation: [L, E, E] tokens that activate both experts; zero diagonal.
        load: [L, E] activations of each expert.
        topology: Ranks and nodes.
        seed: Seed of k-means.
        replicate: Add copies; ranks then have as many slots as the fullest needs.
    """
    layers, experts = load.shape
    contiguous_placement(num_layers=1, num_experts=experts, ep_size=topology.ep_size)
    rng = np.random.default_rng(seed)
    ranks = [group_experts(coactivation[layer], topology, rng) for layer in range(layers)]
    if not replicate:
        return Placement.from_rank_of_expert(np.stack(ranks), ep_size=topology.ep_size)
    held = []
    for layer, rank_E in enumerate(ranks):
        slots = [np.flatnonzero(rank_E == rank).tolist() for rank in range(topology.ep_size)]
        for expert, rank in hot_copies(load[layer], rank_E, topology.ep_size):
            slots[rank].append(expert)
        held.append(slots)
    room = max(len(slots) for row in held for slots in row)
    table = [[slots + [-1] * (room - len(slots)) for slots in row] for row in held]
    return Placement(
        physical_to_logical_map=np.array(table).reshape(layers, -1),
        num_experts=experts,
        ep_size=topology.ep_size,
    )


def group_experts(
    weight_EE: np.ndarray, topology: Topology, rng: np.random.Generator
) -> np.ndarray:
    """[E] rank of each expert: groups for nodes first, then for the ranks of each node."""
    nodes = topology.nodes
    experts = len(weight_EE)
    ranks_of_node = [np.flatnonzero(nodes == node) for node in range(topology.num_nodes)]
    least = max(len(ranks) for ranks in ranks_of_node)
    node_of_expert = spectral_groups(weight_EE, topology.num_nodes, rng)
    node_of_expert = limit_sizes(
        weight_EE, node_of_expert, topology.num_nodes, smallest=least, largest=experts
    )
    rank_E = np.empty(experts, dtype=np.int64)
    for node, ranks in enumerate(ranks_of_node):
        members = np.flatnonzero(node_of_expert == node)
        inside = weight_EE[np.ix_(members, members)]
        mean = len(members) / len(ranks)
        slack = max(1, round(mean * SIZE_SLACK))
        groups = limit_sizes(
            inside,
            spectral_groups(inside, len(ranks), rng),
            len(ranks),
            smallest=max(1, int(np.ceil(mean)) - slack),
            largest=int(np.floor(mean)) + slack,
        )
        rank_E[members] = ranks[groups]
    return rank_E


def spectral_groups(weight_EE: np.ndarray, num_groups: int, rng: np.random.Generator) -> np.ndarray:
    """[E] group of each expert, of any size: k-means on the leading normalised eigenvectors."""
    if num_groups == 1:
        return np.zeros(len(weight_EE), dtype=np.int64)
    scale = 1.0 / np.sqrt(np.maximum(weight_EE.sum(axis=1), 1e-12))
    _, vectors = np.linalg.eigh(weight_EE * scale[:, None] * scale[None, :])
    leading = vectors[:, -num_groups:]
    rows = leading / np.maximum(np.linalg.norm(leading, axis=1, keepdims=True), 1e-12)
    best, best_error = np.zeros(len(rows), dtype=np.int64), np.inf
    for _ in range(10):
        try:
            centres, group = kmeans2(rows, num_groups, minit="++", seed=rng, missing="raise")
        except ClusterError:  # a group ran empty: try another start
            continue
        error = float(((rows - centres[group]) ** 2).sum())
        if error < best_error:
            best, best_error = group.astype(np.int64), error
    return best


def limit_sizes(
    weight_EE: np.ndarray, group: np.ndarray, num_groups: int, *, smallest: int, largest: int
) -> np.ndarray:
    """Bring group sizes into bounds, moving the experts that belong least.

    A group above `largest` keeps the experts with most affinity to it; the rest join the group with
    room that they have most affinity to. A group below `smallest` then takes, from groups that can
    spare them, the experts with least affinity to where they are.
    """
    group = group.copy()
    member = np.eye(num_groups)[group]
    for number in np.flatnonzero(member.sum(axis=0) > largest):
        inside = np.flatnonzero(group == number)
        affinity = weight_EE[np.ix_(inside, inside)].sum(axis=1)
        group[inside[np.argsort(-affinity, kind="stable")[largest:]]] = -1
    spilled = np.flatnonzero(group < 0)
    for expert in spilled:
        size = np.bincount(group[group >= 0], minlength=num_groups)
        affinity = np.array([weight_EE[expert, group == g].sum() for g in range(num_groups)])
        group[expert] = int(np.where(size < largest, affinity, -np.inf).argmax())
    while True:
        size = np.bincount(group, minlength=num_groups)
        wanting = np.flatnonzero(size < smallest)
        if not wanting.size:
            return group
        affinity = (weight_EE * (group[:, None] == group[None, :])).sum(axis=1)
        spare = size[group] > smallest
        group[int(np.where(spare, affinity, np.inf).argmin())] = wanting[0]


def hot_copies(load_E: np.ndarray, rank_E: np.ndarray, ep_size: int) -> list[tuple[int, int]]:
    """(expert, rank) of each copy: the hottest experts of the busiest rank, on the idlest ranks."""
    work = np.bincount(rank_E, weights=load_E, minlength=ep_size)
    busiest = int(work.argmax())
    ratio = work[busiest] / max(float(work.mean()), 1e-12)
    targets = min(max(1, int(ratio)), ep_size - 1)
    inside = np.flatnonzero(rank_E == busiest)
    hottest = inside[np.argsort(-load_E[inside], kind="stable")]
    threshold = work[busiest] * targets / (1 + targets)
    needed = int(np.searchsorted(np.cumsum(load_E[hottest]), threshold, side="right")) + 1
    idle = [rank for rank in np.argsort(work, kind="stable") if rank != busiest][:targets]
    return [(int(expert), int(rank)) for expert in hottest[:needed] for rank in idle]
