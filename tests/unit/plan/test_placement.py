import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semantic_ep.errors import PlacementError
from semantic_ep.plan.placement import Placement


def test_contiguous_is_the_layout_of_upstream_runtimes():
    placement = Placement.contiguous(num_layers=2, num_experts=6, ep_size=3)
    assert placement.rank_of_expert.tolist() == [[0, 0, 1, 1, 2, 2]] * 2
    assert placement.experts_of_rank(1, 2).tolist() == [4, 5]
    assert not placement.has_replicas


def test_an_ep_size_that_does_not_divide_names_the_valid_ones():
    with pytest.raises(
        PlacementError, match=r"does not divide num_experts = 6\. Allowed: 1, 2, 3, 6"
    ):
        Placement.contiguous(num_layers=1, num_experts=6, ep_size=4)


@given(st.data())
def test_both_maps_agree_for_any_placement_with_replicas_and_empty_slots(data):
    ranks = data.draw(st.integers(1, 4))
    experts = data.draw(st.integers(ranks, 9))
    layers = data.draw(st.integers(1, 3))
    seed = data.draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    slots = -(-experts // ranks) + data.draw(st.integers(0, 3))
    table = np.full((layers, ranks, slots), -1)
    for layer in range(layers):
        for expert, rank in enumerate(generator.permutation(np.arange(experts) % ranks)):
            table[layer, rank, np.argmax(table[layer, rank] < 0)] = expert
        for rank in range(ranks):
            others = np.setdiff1d(np.arange(experts), table[layer, rank])
            free = np.flatnonzero(table[layer, rank] < 0)
            copies = generator.permutation(others)[: generator.integers(0, len(free) + 1)]
            table[layer, rank, free[: len(copies)]] = copies
    placement = Placement(
        physical_to_logical_map=table.reshape(layers, -1), num_experts=experts, ep_size=ranks
    )
    physical, logical = placement.physical_to_logical_map, placement.logical_to_physical_map
    for layer in range(layers):
        for expert in range(experts):
            slots_of = logical[layer, expert][logical[layer, expert] >= 0]
            assert slots_of.tolist() == np.flatnonzero(physical[layer] == expert).tolist()
            assert len(slots_of) == placement.logical_count[layer, expert]
            on = np.flatnonzero(placement.expert_on_rank[layer, expert])
            assert on.tolist() == sorted({int(s) // placement.slots_per_rank for s in slots_of})
            copies = placement.copy_of_slot[layer, slots_of]
            assert copies.tolist() == list(range(len(slots_of)))
    assert not placement.copy_of_slot[placement.physical_to_logical_map < 0].any()


@given(st.integers(1, 4), st.integers(1, 10), st.integers(0, 10**6))
def test_ranks_survive_the_way_through_slots_even_when_uneven(ranks, experts, seed):
    rank_of = np.random.default_rng(seed).integers(0, ranks, (2, experts))
    placement = Placement.from_rank_of_expert(rank_of, ep_size=ranks)
    np.testing.assert_array_equal(placement.rank_of_expert, rank_of)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([0, 1, 2, 2], "holds two copies"),
        ([0, 1, 0, 1], "no copy of experts \\[2\\]"),
        ([0, 1, 2, 3], "does not exist"),
        ([0, 1, 2, -2], "does not exist"),
    ],
)
def test_malformed_placements_are_refused_with_the_layer(row, problem):
    with pytest.raises(PlacementError, match=f"layer 1.*{problem}"):
        Placement(physical_to_logical_map=[[0, 1, 2, -1], row], num_experts=3, ep_size=2)


def test_a_placement_cannot_be_changed_in_place():
    placement = Placement.contiguous(num_layers=1, num_experts=4, ep_size=2)
    with pytest.raises(ValueError, match="read-only"):
        placement.physical_to_logical_map[0, 0] = 3
