"""Engine files hold the placement exactly, in the engine's own form."""

import json

import numpy as np
import pytest

from semantic_ep.apply.exporters import (
    read_sglang,
    read_tensorrt_llm,
    read_vllm,
    read_vllm_ascend,
    write_sglang,
    write_tensorrt_llm,
    write_vllm,
    write_vllm_ascend,
)
from semantic_ep.errors import ArtifactError, PlacementError
from semantic_ep.plan.baselines import eplb_placement
from semantic_ep.plan.placement import Placement

LAYER_IDS = (1, 2, 4)


@pytest.fixture
def placement():
    load = np.random.default_rng(0).lognormal(0, 1, (3, 12))
    return eplb_placement(load, ep_size=4, redundant_slots=4)


@pytest.fixture
def with_empty_slots():
    return Placement.from_rank_of_expert(np.array([[0, 0, 0, 1]]), ep_size=2)


def assert_same(found, expected):
    np.testing.assert_array_equal(found.physical_to_logical_map, expected.physical_to_logical_map)
    assert (found.num_experts, found.ep_size) == (expected.num_experts, expected.ep_size)


def test_sglang_round_trip(tmp_path, placement):
    write_sglang(placement, tmp_path / "plan.json", layer_ids=LAYER_IDS)
    found = read_sglang(tmp_path / "plan.json", layer_ids=LAYER_IDS, num_experts=12, ep_size=4)
    assert_same(found, placement)


def test_sglang_file_counts_all_model_layers_and_dense_rows_are_valid_maps(tmp_path, placement):
    write_sglang(placement, tmp_path / "plan.json", layer_ids=LAYER_IDS)
    table = json.loads((tmp_path / "plan.json").read_text())["physical_to_logical_map"]
    assert np.shape(table) == (5, 16)
    assert all(set(row) == set(range(12)) for row in table)


def test_sglang_wants_the_ending_json(tmp_path, placement):
    with pytest.raises(PlacementError, match=r"\.json"):
        write_sglang(placement, tmp_path / "plan", layer_ids=LAYER_IDS)


def test_vllm_round_trip(tmp_path, placement):
    write_vllm(placement, tmp_path / "plan.json")
    assert np.shape(json.loads((tmp_path / "plan.json").read_text())) == (3, 16)
    assert_same(read_vllm(tmp_path / "plan.json", num_experts=12, ep_size=4), placement)


def test_vllm_ascend_round_trip(tmp_path, placement):
    write_vllm_ascend(placement, tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["moe_layer_count"] == 3
    assert [device["device_id"] for device in data["layer_list"][0]["device_list"]] == [0, 1, 2, 3]
    assert_same(read_vllm_ascend(tmp_path / "plan.json", num_experts=12), placement)


def test_tensorrt_llm_round_trip(tmp_path, placement):
    write_tensorrt_llm(placement, tmp_path / "plan.yaml", layer_ids=LAYER_IDS)
    found, layers = read_tensorrt_llm(tmp_path / "plan.yaml", num_experts=12, ep_size=4)
    assert layers == LAYER_IDS
    assert_same(found, placement)


def test_tensorrt_llm_file_is_yaml_with_the_keys_of_the_engine(tmp_path, placement):
    yaml = pytest.importorskip("yaml")
    write_tensorrt_llm(
        placement, tmp_path / "plan.yaml", layer_ids=LAYER_IDS, layer_updates_per_iter=2
    )
    data = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    assert set(data) == {"num_slots", "layer_updates_per_iter", "initial_global_assignments"}
    assert (data["num_slots"], data["layer_updates_per_iter"]) == (16, 2)
    assert list(data["initial_global_assignments"]) == list(LAYER_IDS)


@pytest.mark.parametrize(
    "write",
    [
        lambda placement, path: write_sglang(placement, path, layer_ids=[0]),
        write_vllm,
        write_vllm_ascend,
        lambda placement, path: write_tensorrt_llm(placement, path, layer_ids=[0]),
    ],
)
def test_empty_slots_are_refused_and_nothing_is_written(tmp_path, with_empty_slots, write):
    with pytest.raises(PlacementError, match="every slot"):
        write(with_empty_slots, tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


def test_layer_numbers_that_do_not_fit_are_refused(tmp_path, placement):
    with pytest.raises(PlacementError, match="layer_ids"):
        write_sglang(placement, tmp_path / "plan.json", layer_ids=[1, 2])


@pytest.mark.parametrize("text", ["", "[]", '{"layers": 3}', "num_slots: 4\n"])
def test_another_file_is_refused_by_name(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"x\.json"):
        read_sglang(tmp_path / "x.json", layer_ids=[0], num_experts=4, ep_size=2)
    with pytest.raises(ArtifactError, match=r"x\.json"):
        read_tensorrt_llm(tmp_path / "x.json", num_experts=4, ep_size=2)


def test_a_malformed_assignment_names_its_line(tmp_path):
    (tmp_path / "x.yaml").write_text("initial_global_assignments:\n  3: [0, 1\n")
    with pytest.raises(ArtifactError, match=r"x\.yaml:2"):
        read_tensorrt_llm(tmp_path / "x.yaml", num_experts=2, ep_size=1)
