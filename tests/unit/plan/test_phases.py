import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semantic_ep.errors import PlacementError
from semantic_ep.plan.phases import PhasePlacements
from semantic_ep.plan.placement import Placement
from semantic_ep.runtime.slots import slot_tables

LAYERS, EXPERTS = 2, 8


@st.composite
def placement(draw, ranks, copies=True):
    """Any placement, with copies and empty slots."""
    home = draw(
        st.lists(
            st.lists(st.integers(0, ranks - 1), min_size=EXPERTS, max_size=EXPERTS),
            min_size=LAYERS,
            max_size=LAYERS,
        )
    )
    held = np.zeros((LAYERS, EXPERTS, ranks), dtype=bool)
    for layer, row in enumerate(home):
        held[layer, np.arange(EXPERTS), row] = True
    if copies:
        for expert, rank in draw(
            st.lists(st.tuples(st.integers(0, EXPERTS - 1), st.integers(0, ranks - 1)), max_size=4)
        ):
            held[:, expert, rank] = True
    slots = int(held.sum(axis=1).max())
    table = np.full((LAYERS, ranks, slots), -1)
    for layer in range(LAYERS):
        for rank in range(ranks):
            own = np.flatnonzero(held[layer, :, rank])
            table[layer, rank, : len(own)] = own
    return Placement(
        physical_to_logical_map=table.reshape(LAYERS, -1), num_experts=EXPERTS, ep_size=ranks
    )


@st.composite
def two_placements(draw):
    ranks = draw(st.integers(1, 4))
    return draw(placement(ranks)), draw(placement(ranks))


@given(two_placements())
def test_ranks_hold_the_experts_of_both_and_no_others(both):
    prefill, decode = both
    phases = PhasePlacements.of(prefill, decode)
    held = prefill.expert_on_rank | decode.expert_on_rank
    assert (phases.resident.expert_on_rank == held).all()
    assert phases.resident.slots_per_rank == held.sum(axis=1).max()


@given(two_placements())
def test_a_token_meets_experts_on_its_rank_or_where_its_phase_has_them(both):
    phases = PhasePlacements.of(*both)
    slots = phases.resident.physical_to_logical_map
    for rank in range(phases.resident.ep_size):
        for own, serving in zip(both, phases.serving(rank), strict=True):
            table = slot_tables(serving, rank=rank)
            for layer in range(LAYERS):
                assert slots[layer, table[layer]].tolist() == list(range(EXPERTS))
                where = table[layer] // phases.resident.slots_per_rank
                here = phases.resident.expert_on_rank[layer, :, rank]
                assert (where[here] == rank).all()
                away = np.flatnonzero(~here)
                assert own.expert_on_rank[layer, away, where[away]].all()


def test_of_remote_copies_the_one_on_the_tokens_node_serves():
    spread = Placement(
        physical_to_logical_map=np.tile([0, 1, 2, 3, 0, 4, 5, 6, 7, -1], (LAYERS, 1)),
        num_experts=EXPERTS,
        ep_size=5,
    )
    phases = PhasePlacements.of(spread, spread)
    nodes = np.array([0, 0, 1, 1, 1])
    for rank, copy in ((1, 0), (3, 2), (4, 2)):
        prefill, _ = phases.serving(rank)
        table = slot_tables(prefill, rank=rank, node_of_rank=nodes)
        assert table[0, 0] // phases.resident.slots_per_rank == copy


@given(two_placements(), st.randoms(use_true_random=False))
def test_experts_that_stay_on_a_rank_stay_in_their_slots(both, random):
    current = PhasePlacements.of(*both).resident
    shuffled = current.physical_to_logical_map.reshape(LAYERS, current.ep_size, -1).copy()
    for layer in shuffled:
        for own in layer:
            random.shuffle(own)
    current = Placement(
        physical_to_logical_map=shuffled.reshape(LAYERS, -1),
        num_experts=EXPERTS,
        ep_size=current.ep_size,
    )
    again = PhasePlacements.of(*both, current=current).resident
    assert again.physical_to_logical_map.tolist() == current.physical_to_logical_map.tolist()
    # What goes leaves its slot; what stays does not move.
    less = PhasePlacements.of(both[0], both[0], current=current).resident
    stays = np.take_along_axis(
        less.expert_on_rank.transpose(0, 2, 1).reshape(LAYERS, -1, EXPERTS),
        shuffled.clip(min=0),
        axis=2,
    ) & (shuffled >= 0)
    assert (less.physical_to_logical_map.reshape(shuffled.shape) == shuffled)[stays].all()


def test_too_few_slots_and_other_models_are_refused():
    contiguous = Placement.contiguous(num_layers=LAYERS, num_experts=EXPERTS, ep_size=2)
    turned = Placement.from_rank_of_expert(1 - contiguous.rank_of_expert, ep_size=2)
    with pytest.raises(PlacementError, match=r"got 8 experts on one rank.*at most 4"):
        PhasePlacements.of(contiguous, turned, current=contiguous)
    with pytest.raises(PlacementError, match="different models or ranks"):
        PhasePlacements.of(
            contiguous, Placement.contiguous(num_layers=LAYERS, num_experts=EXPERTS, ep_size=4)
        )
    # Fewer experts a rank than it has slots now, on more ranks than there are.
    wide = Placement.contiguous(num_layers=LAYERS, num_experts=EXPERTS, ep_size=4)
    with pytest.raises(PlacementError, match=r"\(2, 8, 4\) and \(2, 8, 2\)"):
        PhasePlacements.of(wide, wide, current=contiguous)
