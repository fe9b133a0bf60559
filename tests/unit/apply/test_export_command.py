"""`semantic-ep export` writes what the engine reads, and says what the engine needs for it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from semantic_ep.apply.exporters import (
    read_sglang,
    read_tensorrt_llm,
    read_vllm,
    read_vllm_ascend,
)
from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.cli import main
from semantic_ep.plan.baselines import eplb_placement
from semantic_ep.plan.placement import Placement
from tests.unit.apply.test_command import save_plan

EXPERTS, RANKS, LAYER_IDS = 12, 4, (1, 2, 4)
READERS = {
    "sglang": lambda path: read_sglang(
        path, layer_ids=LAYER_IDS, num_experts=EXPERTS, ep_size=RANKS
    ),
    "vllm": lambda path: read_vllm(path, num_experts=EXPERTS, ep_size=RANKS),
    "vllm-ascend": lambda path: read_vllm_ascend(path, num_experts=EXPERTS),
    "tensorrt-llm": lambda path: read_tensorrt_llm(path, num_experts=EXPERTS, ep_size=RANKS)[0],
}


@pytest.fixture
def fingerprint():
    return ModelFingerprint(architecture="toy", layer_ids=LAYER_IDS, num_experts=EXPERTS, top_k=2)


@pytest.fixture
def replicated(tmp_path, fingerprint) -> Placement:
    load = np.random.default_rng(0).lognormal(0, 1, (len(LAYER_IDS), EXPERTS))
    placement = eplb_placement(load, ep_size=RANKS, redundant_slots=RANKS)
    save_plan(tmp_path / "plan", fingerprint, placement.physical_to_logical_map, RANKS)
    return placement


def export(tmp_path, engine: str, *more: str) -> list[str]:
    output = str(tmp_path / "placement.json")
    return ["export", "--plan", str(tmp_path / "plan"), "--to", engine, "--out", output, *more]


@pytest.mark.parametrize("engine", READERS)
def test_each_engine_gets_the_replicated_placement_of_the_plan(
    tmp_path, replicated, engine, capsys
):
    assert main(export(tmp_path, engine)) == 0
    assert f"{engine} needs:" in capsys.readouterr().out
    found = READERS[engine](tmp_path / "placement.json")
    np.testing.assert_array_equal(found.physical_to_logical_map, replicated.physical_to_logical_map)
    assert (found.num_experts, found.ep_size) == (EXPERTS, RANKS)


def test_the_engine_is_told_how_many_redundant_experts_to_start_with(tmp_path, replicated, capsys):
    assert main(export(tmp_path, "sglang", "--json", "--dry-run")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert f"--ep-num-redundant-experts {RANKS}" in printed["needs"]
    assert any("--ep-dispatch-algorithm" in need for need in printed["needs"])
    assert printed["output"] is None
    assert not (tmp_path / "placement.json").exists()


def test_a_plan_with_empty_slots_is_refused_and_nothing_written(tmp_path, fingerprint, capsys):
    rows = np.full((len(LAYER_IDS), RANKS * 4), -1)
    rows[:, :EXPERTS] = np.arange(EXPERTS)
    save_plan(tmp_path / "plan", fingerprint, rows, RANKS)
    for flags in ([], ["--dry-run"]):
        assert main(export(tmp_path, "vllm", *flags)) == 2
        assert "every slot" in capsys.readouterr().err
    assert not (tmp_path / "placement.json").exists()


def test_a_file_that_cannot_be_written_is_named(tmp_path, replicated, capsys):
    arguments = ["export", "--plan", str(tmp_path / "plan"), "--to", "vllm"]
    assert main([*arguments, "--out", str(tmp_path / "nowhere" / "placement.json")]) == 2
    assert "nowhere" in capsys.readouterr().err
