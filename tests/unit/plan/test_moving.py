"""Re-planning leaves experts where they are as far as the new placement allows."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semantic_ep.errors import PlacementError
from semantic_ep.plan.baselines import eplb_placement, random_placement
from semantic_ep.plan.moving import count_moves, rank_names, relabel_ranks
from semantic_ep.plan.placement import Placement
from semantic_ep.topology import Topology


def groups(placement, layer):
    return sorted(
        tuple(sorted(placement.experts_of_rank(layer, rank))) for rank in range(placement.ep_size)
    )


def renamed_ranks(placement, order):
    slots = placement.physical_to_logical_map.reshape(placement.num_layers, placement.ep_size, -1)
    return Placement(
        physical_to_logical_map=slots[:, order].reshape(placement.num_layers, -1),
        num_experts=placement.num_experts,
        ep_size=placement.ep_size,
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_relabelling_keeps_the_groups_and_moves_least_of_all_rank_orders(seed):
    wanted = random_placement(num_layers=2, num_experts=8, ep_size=4, seed=seed)
    current = random_placement(num_layers=2, num_experts=8, ep_size=4, seed=seed + 1)
    found = relabel_ranks(wanted, current)
    fewest = [
        min(
            count_moves(renamed_ranks(wanted, list(order)), current, bytes_per_expert=1).copies[i]
            for order in itertools.permutations(range(4))
        )
        for i in range(2)
    ]
    assert [groups(found, i) for i in range(2)] == [groups(wanted, i) for i in range(2)]
    assert count_moves(found, current, bytes_per_expert=1).copies.tolist() == fewest


def test_a_placement_that_only_names_ranks_otherwise_moves_nothing():
    current = random_placement(num_layers=3, num_experts=16, ep_size=4, seed=1)
    found = relabel_ranks(renamed_ranks(current, [2, 0, 3, 1]), current)
    np.testing.assert_array_equal(found.physical_to_logical_map, current.physical_to_logical_map)


def test_shared_ranks_are_renamed_alike_in_every_layer():
    wanted = random_placement(num_layers=4, num_experts=16, ep_size=4, seed=5)
    current = random_placement(num_layers=4, num_experts=16, ep_size=4, seed=6)
    names = rank_names(wanted, current, shared_ranks=True)
    assert (names == names[0]).all()
    free = count_moves(relabel_ranks(wanted, current), current, bytes_per_expert=1)
    shared = count_moves(
        relabel_ranks(wanted, current, shared_ranks=True), current, bytes_per_expert=1
    )
    assert free.bytes <= shared.bytes


def test_experts_of_a_node_stay_together():
    wanted = random_placement(num_layers=2, num_experts=16, ep_size=4, seed=8)
    current = random_placement(num_layers=2, num_experts=16, ep_size=4, seed=9)
    topology = Topology.uniform(4, num_nodes=2)
    names = rank_names(wanted, current, topology=topology)
    node = topology.nodes[names]
    assert (node[:, 0] == node[:, 1]).all()
    assert (node[:, 2] == node[:, 3]).all()


def test_nodes_of_different_size_are_not_exchanged():
    wanted = random_placement(num_layers=1, num_experts=12, ep_size=3, seed=1)
    current = random_placement(num_layers=1, num_experts=12, ep_size=3, seed=2)
    names = rank_names(wanted, current, topology=Topology(node_of_rank=(0, 0, 1)))
    assert names[0, 2] == 2


def test_replicas_are_relabelled_too_and_kept_slots_stay():
    load = np.random.default_rng(0).lognormal(0, 1, (2, 12))
    current = eplb_placement(load, ep_size=4, redundant_slots=4)
    drifted = load * np.random.default_rng(1).lognormal(0, 0.2, load.shape)
    wanted = eplb_placement(drifted, ep_size=4, redundant_slots=4)
    found = relabel_ranks(wanted, current)
    before = count_moves(wanted, current, bytes_per_expert=1)
    after = count_moves(found, current, bytes_per_expert=1)
    assert after.bytes < before.bytes
    same_slot = (found.physical_to_logical_map == current.physical_to_logical_map).sum()
    assert same_slot == found.physical_to_logical_map.size - after.copies.sum()
    np.testing.assert_array_equal(found.logical_count, wanted.logical_count)


def test_bytes_count_copies_that_arrive_and_the_busiest_rank():
    def place(row):
        return Placement(physical_to_logical_map=np.array([row]), num_experts=4, ep_size=2)

    moves = count_moves(
        place([0, 1, 2, 3]),
        place([0, 3, 2, 1]),
        bytes_per_expert=10,
        topology=Topology(node_of_rank=(0, 1)),
    )
    assert moves.copies.tolist() == [2]
    assert moves.from_other_node.tolist() == [2]
    assert (moves.bytes, moves.bytes_of_busiest_rank) == (20, 10)


def test_an_expert_held_elsewhere_on_the_node_crosses_no_node():
    one_node = Topology.uniform(2)
    current = random_placement(num_layers=1, num_experts=8, ep_size=2, seed=1)
    wanted = random_placement(num_layers=1, num_experts=8, ep_size=2, seed=2)
    moves = count_moves(wanted, current, bytes_per_expert=1, topology=one_node)
    assert moves.copies.sum() > 0
    assert moves.from_other_node.sum() == 0


def test_placements_of_different_models_are_refused():
    first = random_placement(num_layers=1, num_experts=8, ep_size=2)
    other = random_placement(num_layers=2, num_experts=8, ep_size=2)
    with pytest.raises(PlacementError, match="different models"):
        count_moves(first, other, bytes_per_expert=1)
