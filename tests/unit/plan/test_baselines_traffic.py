"""Published methods that look at traffic do what their papers state."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.baselines import (
    exflow_placement,
    grace_placement,
    moetuner_placement,
    occult_placement,
    semmoe_placement,
)
from semantic_ep.plan.baselines.exflow import kept_transitions
from semantic_ep.plan.baselines.grace import hot_copies, limit_sizes
from semantic_ep.plan.baselines.moetuner import balance_clusters, bottleneck, map_clusters
from semantic_ep.plan.policies import PlacementPolicy, policies
from semantic_ep.topology import Topology

LAYERS, EXPERTS, RANKS = 3, 8, 2


@pytest.fixture(scope="module")
def planted():
    """Tokens of two kinds; each layer serves a kind with its own hidden half of the experts."""
    rng = np.random.default_rng(3)
    halves = [rng.permutation(EXPERTS).reshape(2, -1) for _ in range(LAYERS)]
    kind = rng.integers(2, size=2000)
    routes = np.stack(
        [
            np.stack([rng.permutation(half[side])[:2] for side in kind], axis=0)
            for half in halves
        ],
        axis=1,
    )  # fmt: skip
    trace = RoutingTrace(
        fingerprint=ModelFingerprint(
            architecture="planted", layer_ids=tuple(range(LAYERS)), num_experts=EXPERTS, top_k=2
        ),
        experts=routes.astype(np.uint8),
        offsets=np.arange(0, 2001, 50),
        token_id=(kind * 20 + rng.integers(20, size=2000)).astype(np.int32),
    )
    return RoutingProfile.from_trace(trace), halves


def same_groups(rank_E, half):
    return len(set(rank_E[half[0]])) == 1 and len(set(rank_E[half[1]])) == 1


@pytest.mark.parametrize("name", ["exflow", "grace", "occult", "semmoe"])
def test_planted_groups_of_experts_are_found(planted, name):
    profile, halves = planted
    placement = policies()[name].place(profile, ep_size=RANKS)
    assert all(
        same_groups(rank, half) for rank, half in zip(placement.rank_of_expert, halves)
    )  # fmt: skip


def test_exflow_aligns_the_groups_of_neighbouring_layers(planted):
    profile, _ = planted
    placement = exflow_placement(profile.transition, ep_size=RANKS)
    kept = kept_transitions(profile.transition, placement.rank_of_expert)
    assert kept == profile.transition.sum()


def test_exflow_puts_groups_on_nodes_first():
    rng = np.random.default_rng(0)
    block = np.kron(np.eye(2), np.ones((4, 4))) * 10 + rng.random((8, 8))
    placement = exflow_placement(np.stack([block, block]), ep_size=4, num_nodes=2)
    node = placement.rank_of_expert // 2
    assert kept_transitions(np.stack([block, block]), node) > 0.9 * 2 * block.sum()


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000))
def test_exflow_matches_brute_force_on_two_layers_of_four_experts(seed):
    transition = np.random.default_rng(seed).random((1, 4, 4))
    halves = [np.array(half) for half in set(itertools.permutations([0, 0, 1, 1]))]
    best = max(
        kept_transitions(transition, np.stack([first, second]))
        for first in halves
        for second in halves
    )
    placement = exflow_placement(transition, ep_size=2, starts=12)
    assert kept_transitions(transition, placement.rank_of_expert) == pytest.approx(best)


def least_deviation(load, clusters):
    """Optimum of MoETuner's first program with exact counts, by mixed-integer programming."""
    experts = len(load)
    size = experts * clusters
    cost = np.concatenate([np.zeros(size), np.ones(clusters)])
    rows, low, high = [], [], []

    def add(row, lower, upper):
        rows.append(row)
        low.append(lower)
        high.append(upper)

    for expert in range(experts):
        row = np.zeros(size + clusters)
        row[expert:size:experts] = 1
        add(row, 1, 1)
    for cluster in range(clusters):
        held = slice(cluster * experts, (cluster + 1) * experts)
        row = np.zeros(size + clusters)
        row[held] = 1
        add(row, experts // clusters, experts // clusters)
        for sign in (1, -1):
            row = np.zeros(size + clusters)
            row[held] = sign * load
            row[size + cluster] = -1
            add(row, -np.inf, sign * load.sum() / clusters)
    kinds = np.concatenate([np.ones(size), np.zeros(clusters)])
    solved = milp(
        cost,
        constraints=LinearConstraint(np.array(rows), low, high),
        integrality=kinds,
        bounds=Bounds(0, np.concatenate([np.ones(size), np.full(clusters, np.inf)])),
    )
    return solved.fun


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000))
def test_moetuner_clusters_are_within_its_tolerance_of_the_integer_program(seed):
    load = np.random.default_rng(seed).integers(1, 100, 8).astype(float)
    cluster = balance_clusters(load, 2)
    total = np.bincount(cluster, weights=load)
    assert np.bincount(cluster).tolist() == [4, 4]
    deviation = np.abs(total - load.sum() / 2).sum()
    assert deviation <= least_deviation(load, 2) + 0.025 * load.sum()


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000))
def test_moetuner_mapping_is_optimal_for_few_ranks(seed):
    volume = np.random.default_rng(seed).random((2, 3, 3))
    cost = 1.0 - np.eye(3)
    orders = [np.array(order) for order in itertools.permutations(range(3))]

    def total(chain):
        return sum(bottleneck(volume[i], cost, chain[i], chain[i + 1]) for i in range(2))

    best = min(total(chain) for chain in itertools.product(orders, repeat=3))
    assert total(map_clusters(volume, cost, 3)) == pytest.approx(best)


def test_moetuner_mapping_by_swaps_undoes_a_hidden_order():
    rng = np.random.default_rng(1)
    order = rng.permutation(6)
    volume = (10 * np.eye(6) + 0.1 * rng.random((6, 6)))[:, order][None]
    cost = 1.0 - np.eye(6)
    chosen = map_clusters(volume, cost, 2)
    assert bottleneck(volume[0], cost, chosen[0], chosen[1]) < 1


def test_moetuner_balances_load_and_keeps_counts():
    rng = np.random.default_rng(2)
    load = rng.lognormal(0, 1, (3, 16))
    placement = moetuner_placement(
        load, rng.random((2, 16, 16)), topology=Topology.uniform(4, num_nodes=2)
    )
    for layer in range(3):
        rank = placement.rank_of_expert[layer]
        assert np.bincount(rank).tolist() == [4] * 4
        total = np.bincount(rank, weights=load[layer])
        assert total.max() <= max(1.3 * total.mean(), load[layer].max() * 1.5)


def test_occult_grows_a_cluster_around_the_heaviest_pair():
    weight = np.zeros((4, 4))
    weight[0, 3] = weight[3, 0] = 9
    weight[1, 2] = weight[2, 1] = 1
    rank = occult_placement(weight[None], ep_size=2).rank_of_expert[0]
    assert rank[0] == rank[3] != rank[1] == rank[2]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_grace_sizes_are_brought_into_bounds(seed):
    rng = np.random.default_rng(seed)
    weight = rng.random((16, 16))
    weight += weight.T
    sizes = np.bincount(
        limit_sizes(weight, rng.integers(4, size=16) // 2, 4, smallest=3, largest=5), minlength=4
    )
    assert sizes.min() >= 3
    assert sizes.max() <= 5


def test_grace_keeps_the_experts_that_belong_most():
    weight = np.zeros((4, 4))
    weight[0, 1] = weight[1, 0] = 5
    weight[0, 2] = weight[2, 0] = 1
    group = limit_sizes(weight, np.array([0, 0, 0, 1]), 2, smallest=2, largest=2)
    assert group.tolist() == [0, 0, 1, 1]


def test_grace_copies_the_hottest_experts_of_the_busiest_rank_to_the_idlest():
    load = np.array([60.0, 30, 10, 5, 8, 7])
    rank = np.array([0, 0, 1, 1, 2, 2])
    # Mean 40, busiest 90: two target ranks, and 60 < 90 * 2/3 fails, so both experts are copied.
    assert hot_copies(load, rank, 3) == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_grace_replicates_into_slots_of_its_own(planted):
    profile, _ = planted
    placement = grace_placement(
        profile.coactivation,
        profile.load,
        topology=Topology.uniform(RANKS),
        replicate=True,
    )
    assert placement.has_replicas


def test_semmoe_is_a_function_of_its_seed(planted):
    profile, _ = planted
    first = semmoe_placement(profile, ep_size=RANKS, seed=1).physical_to_logical_map
    again = semmoe_placement(profile, ep_size=RANKS, seed=1).physical_to_logical_map
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("name", sorted(policies()))
@pytest.mark.parametrize("nodes", [1, 2])
def test_every_policy_places_every_expert_on_every_topology(planted, name, nodes):
    profile, _ = planted
    chosen = policies()[name]
    assert isinstance(chosen, PlacementPolicy)
    placement = chosen.place(
        profile, ep_size=4, topology=Topology.uniform(4, num_nodes=nodes), time_limit=5
    )
    assert placement.logical_count.min() >= 1
    assert placement.ep_size == 4
