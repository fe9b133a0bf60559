"""EPLB and the placements that need no solver."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semantic_ep.errors import PlacementError
from semantic_ep.plan.baselines import (
    contiguous_placement,
    eplb_placement,
    greedy_load_placement,
    random_placement,
    rebalance_experts,
)
from semantic_ep.plan.baselines.eplb import balanced_packing, replicate_experts, separate_copies

GOLDEN_LOAD = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)


def test_eplb_reproduces_the_published_example():
    maps = rebalance_experts(GOLDEN_LOAD, 16, ep_size=8, num_groups=4, num_nodes=2)
    assert maps.physical_to_logical_map.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def test_eplb_maps_agree_with_each_other():
    maps = rebalance_experts(GOLDEN_LOAD, 16, ep_size=8, num_groups=4, num_nodes=2)
    for layer in range(2):
        for expert in range(12):
            slots = maps.logical_to_physical_map[layer, expert]
            slots = slots[slots >= 0]
            assert len(slots) == maps.logical_count[layer, expert]
            assert (maps.physical_to_logical_map[layer, slots] == expert).all()


def test_eplb_is_global_where_nodes_do_not_divide_groups():
    uneven = rebalance_experts(GOLDEN_LOAD, 16, ep_size=8, num_groups=3, num_nodes=2)
    flat = rebalance_experts(GOLDEN_LOAD, 16, ep_size=8)
    np.testing.assert_array_equal(uneven.physical_to_logical_map, flat.physical_to_logical_map)


def test_hierarchical_eplb_keeps_a_group_of_experts_on_one_node():
    maps = rebalance_experts(GOLDEN_LOAD, 16, ep_size=8, num_groups=4, num_nodes=2)
    node_of_slot = np.arange(16) // 8
    for row in maps.physical_to_logical_map:
        for group in range(4):
            assert len(set(node_of_slot[row // 3 == group])) == 1


@given(
    st.lists(st.integers(0, 1000), min_size=12, max_size=12),
    st.sampled_from([2, 3, 4, 6]),
)
def test_packing_fills_each_pack_and_is_within_the_heaviest_item_of_the_mean(weights, packs):
    weight = np.array([weights], dtype=float)
    pack, position = balanced_packing(weight, packs)
    room = 12 // packs
    assert np.bincount(pack[0], minlength=packs).tolist() == [room] * packs
    assert len(set(zip(pack[0].tolist(), position[0].tolist()))) == 12
    total = np.bincount(pack[0], weights=weight[0], minlength=packs)
    assert total.max() - total.min() <= weight.max() * room


@given(st.lists(st.integers(1, 1000), min_size=4, max_size=4), st.integers(0, 5))
def test_greedy_replication_minimises_the_largest_copy_load(loads, spare):
    load = np.array([loads], dtype=float)
    _, _, copies = replicate_experts(load, 4 + spare)
    options = (
        np.array([a, b, c, 4 + spare - a - b - c])
        for a in range(1, spare + 2)
        for b in range(1, spare + 2)
        for c in range(1, spare + 2)
        if 4 + spare - a - b - c >= 1
    )
    best = min((load[0] / option).max() for option in options)
    assert (load / copies).max() == pytest.approx(best)


def test_two_copies_that_eplb_puts_on_one_rank_are_separated():
    load = np.array([[1000.0, 1, 1, 1, 1, 1]])
    published = rebalance_experts(load, 9, ep_size=3).physical_to_logical_map[0].reshape(3, 3)
    assert any(len(set(rank)) < 3 for rank in published.tolist())
    placement = eplb_placement(load, ep_size=3, redundant_slots=3)
    for rank in placement.physical_to_logical_map[0].reshape(3, 3).tolist():
        assert len(set(rank)) == 3
    assert placement.logical_count[0, 0] == 3


@given(st.integers(0, 10_000), st.sampled_from([(2, 4), (4, 4), (3, 5)]))
def test_separation_ends_with_distinct_experts_and_keeps_the_copies(seed, shape):
    ranks, room = shape
    rng = np.random.default_rng(seed)
    pool = np.repeat(np.arange(room + 1), ranks)  # every expert at most once a rank
    slots = rng.choice(pool, ranks * room, replace=False)
    separated = separate_copies(slots, rng.random(len(slots)), num_ranks=ranks)
    assert sorted(separated) == sorted(slots)
    for rank in separated.reshape(ranks, room).tolist():
        assert len(set(rank)) == room


@pytest.mark.parametrize(("nodes", "most"), [(1, 12), (2, 4)])
def test_copies_of_one_expert_are_as_many_as_ranks_at_most(nodes, most):
    """One hot expert asks for every spare slot, and gets one on each rank of its node."""
    load = np.array([[1000.0, 1, 1, 1]])
    for spare in range(0, most + 1, 4):
        placement = eplb_placement(load, ep_size=4, redundant_slots=spare, num_groups=nodes,
                                   num_nodes=nodes)  # fmt: skip
        assert placement.logical_count[0, 0] == (1 if spare == 0 else 4 // nodes)
    with pytest.raises(PlacementError, match=rf"Allowed: 0\.\.{most}"):
        eplb_placement(load, ep_size=4, redundant_slots=most + 4, num_groups=nodes,
                       num_nodes=nodes)  # fmt: skip


def test_eplb_refuses_counts_that_do_not_divide():
    with pytest.raises(PlacementError, match="num_slots by ep_size"):
        rebalance_experts(GOLDEN_LOAD, 15, ep_size=8)


def test_greedy_load_equals_eplb_without_spare_slots():
    load = np.random.default_rng(0).random((3, 16))
    np.testing.assert_array_equal(
        greedy_load_placement(load, ep_size=4).rank_of_expert,
        eplb_placement(load, ep_size=4).rank_of_expert,
    )


def test_greedy_load_balances_better_than_contiguous_on_a_sorted_load():
    load = np.arange(32.0)[None]
    greedy = greedy_load_placement(load, ep_size=4).rank_of_expert[0]
    plain = contiguous_placement(num_layers=1, num_experts=32, ep_size=4).rank_of_expert[0]
    assert np.ptp(np.bincount(greedy, load[0])) < 0.1 * np.ptp(np.bincount(plain, load[0]))


def test_random_placement_is_a_function_of_its_seed_and_differs_between_layers():
    first = random_placement(num_layers=2, num_experts=16, ep_size=4, seed=1)
    again = random_placement(num_layers=2, num_experts=16, ep_size=4, seed=1)
    other = random_placement(num_layers=2, num_experts=16, ep_size=4, seed=2)
    np.testing.assert_array_equal(first.physical_to_logical_map, again.physical_to_logical_map)
    assert (first.physical_to_logical_map != other.physical_to_logical_map).any()
    assert (first.physical_to_logical_map[0] != first.physical_to_logical_map[1]).any()
