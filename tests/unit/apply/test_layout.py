from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semantic_ep.apply.families import RouterGroups
from semantic_ep.apply.layout import Layout, relayout
from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.errors import ArtifactError, PlacementError
from semantic_ep.plan.placement import Placement


def fingerprint(layers: int, experts: int) -> ModelFingerprint:
    return ModelFingerprint(
        architecture="qwen3_moe",
        layer_ids=tuple(range(3, 3 + layers)),
        num_experts=experts,
        top_k=2,
    )


def layout(rows: list[list[int]]) -> Layout:
    return Layout(
        physical_to_logical_map=np.array(rows), fingerprint=fingerprint(len(rows), len(rows[0]))
    )


@st.composite
def layouts(draw: st.DrawFn, count: int = 1) -> list[Layout]:
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 16))
    permutation = st.permutations(range(experts))
    return [
        layout(draw(st.lists(permutation, min_size=layers, max_size=layers))) for _ in range(count)
    ]


@given(layouts())
def test_the_two_maps_of_a_layout_are_inverse_to_each_other(drawn: list[Layout]) -> None:
    there, back = drawn[0].physical_to_logical_map, drawn[0].logical_to_physical_map
    slots = np.broadcast_to(np.arange(there.shape[1]), there.shape)
    np.testing.assert_array_equal(np.take_along_axis(there, back, axis=1), slots)
    np.testing.assert_array_equal(np.take_along_axis(back, there, axis=1), slots)


@given(layouts(count=3))
def test_moving_rows_between_layouts_composes_and_reaches_the_new_layout(
    drawn: list[Layout],
) -> None:
    first, second, third = drawn
    # Rows tagged with their logical expert, stored in the order of the first layout.
    rows = first.physical_to_logical_map
    in_second = np.take_along_axis(rows, relayout(first, second), axis=1)
    np.testing.assert_array_equal(in_second, second.physical_to_logical_map)
    through = np.take_along_axis(in_second, relayout(second, third), axis=1)
    direct = np.take_along_axis(rows, relayout(first, third), axis=1)
    np.testing.assert_array_equal(through, direct)


@given(layouts())
def test_a_layout_goes_back_to_logical_order_by_its_inverse(drawn: list[Layout]) -> None:
    identity = Layout.identity(drawn[0].fingerprint)
    np.testing.assert_array_equal(relayout(identity, drawn[0]), drawn[0].physical_to_logical_map)
    np.testing.assert_array_equal(relayout(drawn[0], identity), drawn[0].logical_to_physical_map)


@given(st.data(), st.integers(1, 4), st.integers(1, 4))
def test_routers_accept_exactly_the_permutations_of_groups_and_inside_groups(
    data: st.DataObject, groups: int, size: int
) -> None:
    row = data.draw(st.permutations(range(groups * size)))
    blocks = [{expert // size for expert in row[g * size : (g + 1) * size]} for g in range(groups)]
    legal = all(len(block) == 1 for block in blocks)
    limits = RouterGroups(num_groups=groups, topk_group=1)
    if legal:
        layout([row]).check_router(limits)
    else:
        with pytest.raises(PlacementError, match="router groups"):
            layout([row]).check_router(limits)


@given(st.data(), st.integers(1, 4), st.integers(1, 4))
def test_a_legal_permutation_built_from_groups_is_accepted(
    data: st.DataObject, groups: int, size: int
) -> None:
    row = [
        group * size + expert
        for group in data.draw(st.permutations(range(groups)))
        for expert in data.draw(st.permutations(range(size)))
    ]
    layout([row]).check_router(RouterGroups(num_groups=groups, topk_group=1))


def test_the_refusal_names_layer_slots_and_experts() -> None:
    identity, mixed = [0, 1, 2, 3], [0, 2, 1, 3]
    with pytest.raises(PlacementError) as refusal:
        layout([identity, mixed]).check_router(RouterGroups(num_groups=2, topk_group=1))
    message = str(refusal.value)
    assert "layer 4" in message
    assert "slots 0..1" in message
    assert "experts [0, 2]" in message
    assert "best 1 of 2 groups" in message


def test_a_router_without_groups_accepts_any_permutation() -> None:
    layout([[3, 0, 2, 1]]).check_router(None)


def test_placements_with_replicas_are_refused_with_the_expert_that_has_them() -> None:
    placement = Placement(
        physical_to_logical_map=np.array([[0, 1, 2, 0]]), num_experts=3, ep_size=2
    )
    with pytest.raises(PlacementError, match="layer 3 has 2 copies of expert 0"):
        Layout.from_placement(placement, fingerprint(1, 3))


def test_placements_with_uneven_ranks_are_refused() -> None:
    placement = Placement.from_rank_of_expert(np.array([[0, 0, 1]]), ep_size=2)
    with pytest.raises(PlacementError, match="slot 3 of layer 3 is empty"):
        Layout.from_placement(placement, fingerprint(1, 3))


def test_placements_of_another_model_are_refused() -> None:
    placement = Placement.contiguous(num_layers=2, num_experts=4, ep_size=2)
    with pytest.raises(PlacementError, match="does not fit the model"):
        Layout.from_placement(placement, fingerprint(3, 4))


def test_a_map_that_is_no_permutation_is_refused() -> None:
    with pytest.raises(PlacementError, match="layer 4 does not hold each expert exactly once"):
        layout([[0, 1], [1, 1]])


@given(layouts())
def test_an_engine_gets_the_planned_experts_on_any_number_of_ranks(drawn: list[Layout]) -> None:
    experts = drawn[0].fingerprint.num_experts
    for ep_size in (size for size in range(1, experts + 1) if experts % size == 0):
        placement = drawn[0].placement(ep_size)
        back = Layout.from_placement(placement, drawn[0].fingerprint)
        np.testing.assert_array_equal(
            back.physical_to_logical_map, drawn[0].physical_to_logical_map
        )
        rank = drawn[0].logical_to_physical_map // (experts // ep_size)
        np.testing.assert_array_equal(placement.rank_of_expert, rank)


def test_ranks_that_do_not_divide_the_experts_are_refused() -> None:
    with pytest.raises(PlacementError, match="ep_size = 3"):
        layout([[0, 1, 2, 3]]).placement(3)


def test_a_layout_survives_the_disk_and_refuses_to_be_read_as_something_else(tmp_path) -> None:
    saved = layout([[2, 0, 1], [0, 2, 1]])
    digest = saved.save(tmp_path / "layout", {"plan": "abc"})
    loaded = Layout.read(tmp_path / "layout")
    np.testing.assert_array_equal(loaded.physical_to_logical_map, saved.physical_to_logical_map)
    assert loaded.fingerprint == saved.fingerprint
    assert loaded.sha256 == digest
    data = next((tmp_path / "layout").glob("*.safetensors"))
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="truncated or altered"):
        Layout.read(tmp_path / "layout")
