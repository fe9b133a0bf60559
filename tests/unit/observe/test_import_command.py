"""Routing of other tools is imported, planned on, exported and read back."""

from __future__ import annotations

import json

import numpy as np
import pytest

from semantic_ep.apply.exporters import read_sglang
from semantic_ep.cli import main
from semantic_ep.observe.formats import (
    write_logical_count,
    write_megatron_trace,
    write_npz_trace,
    write_vllm_trace,
)
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.plan import Plan
from tests.unit.observe.sglang_dumps import write_sglang_trace
from tests.unit.plan.synthetic import planted_trace

# Writer, file, and what the model's layers 1 and 2 are stated with; layer 0 is dense.
STATED = ("--layer-ids", "1-2")
WRITERS = {
    "npz": (write_npz_trace, "trace.npz", STATED),
    "megatron-router-trace": (write_megatron_trace, "traces", STATED),
    "vllm-routed-experts": (write_vllm_trace, "responses.jsonl", STATED),
    "sglang-per-token": (write_sglang_trace, "dumps", ()),
}


@pytest.mark.parametrize("name", WRITERS)
def test_from_a_foreign_file_to_an_engine_and_back(tmp_path, name, capsys):
    write, file, stated = WRITERS[name]
    write(planted_trace(requests=80, seed=1), tmp_path / file)
    run = tmp_path / "run"
    source = ["import", "--from", name, str(tmp_path / file), "--out", str(run), *stated]
    assert main([*source, "--profile-fraction", "0.5"]) == 0
    plan = ["plan", "--profile", str(run / "profile"), "--holdout", str(run / "holdout")]
    assert main([*plan, "--ep-size", "4", "-o", str(run / "plan"), "--json"]) in (0, 1)
    export = ["export", "--plan", str(run / "plan"), "--to", "sglang"]
    assert main([*export, "--out", str(run / "sglang.json")]) == 0
    found = read_sglang(run / "sglang.json", layer_ids=(1, 2), num_experts=16, ep_size=4)
    planned = Plan.read(run / "plan").placement
    np.testing.assert_array_equal(found.physical_to_logical_map, planned.physical_to_logical_map)


def test_an_imported_trace_is_the_trace_and_serves_as_profile_too(tmp_path, capsys):
    trace = planted_trace(seed=1)
    write_npz_trace(trace, tmp_path / "a.npz")
    assert (
        main(["import", "--from", "npz", str(tmp_path / "a.npz"), "-o", str(tmp_path / "a")]) == 0
    )
    found = RoutingTrace.load(tmp_path / "a")
    np.testing.assert_array_equal(found.experts, trace.experts)
    np.testing.assert_array_equal(found.token_id, trace.token_id)
    counted = RoutingProfile.read(tmp_path / "a")
    np.testing.assert_array_equal(counted.load, RoutingProfile.from_trace(trace).load)


def test_loads_alone_can_be_balanced_but_not_planned_for_affinity(tmp_path, capsys):
    trace = planted_trace(seed=1)
    load = RoutingProfile.from_trace(trace).load
    write_logical_count(load, tmp_path / "load.json")
    trace.save(tmp_path / "holdout")
    source = ["import", "--from", "sglang-logical-count", str(tmp_path / "load.json")]
    assert main([*source, "-o", str(tmp_path / "profile")]) == 2
    assert "--top-k" in capsys.readouterr().err
    assert main([*source, "-o", str(tmp_path / "profile"), "--top-k", "2", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["kind"], row["tokens"]) == ("profile", trace.num_tokens)
    plan = ["plan", "--profile", str(tmp_path / "profile"), "--holdout", str(tmp_path / "holdout")]
    plan += ["--ep-size", "4", "-o", str(tmp_path / "plan"), "--json"]
    assert main(plan) == 2
    assert "--policy eplb" in capsys.readouterr().err
    assert main([*plan, "--policy", "eplb"]) in (0, 1)
    assert Plan.read(tmp_path / "plan").placement.ep_size == 4


DEEPSEEK = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
}


def test_the_models_config_numbers_layers_and_counts_experts(tmp_path, capsys):
    write_npz_trace(planted_trace(seed=1), tmp_path / "a.npz")
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK))
    source = ["import", "--from", "npz", str(tmp_path / "a.npz"), "-o", str(tmp_path / "a")]
    with np.load(tmp_path / "a.npz") as archive:
        arrays = {name: archive[name] for name in archive if name != "layer_ids"}
    np.savez(tmp_path / "a.npz", **arrays)
    assert main([*source, "--config", str(tmp_path)]) == 0
    assert RoutingTrace.load(tmp_path / "a").fingerprint.layer_ids == (1, 2)


def test_the_config_of_another_model_is_refused(tmp_path, capsys):
    write_npz_trace(planted_trace(seed=1), tmp_path / "a.npz")
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK | {"num_experts_per_tok": 4}))
    source = ["import", "--from", "npz", str(tmp_path / "a.npz"), "-o", str(tmp_path / "a")]
    assert main([*source, "--config", str(tmp_path / "config.json")]) == 2
    assert "top_k 2 instead of 4" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("text", ["", "1-", "a", "1..3", "-1"])
def test_layers_that_are_no_list_are_refused(tmp_path, text, capsys):
    write_npz_trace(planted_trace(seed=1), tmp_path / "a.npz")
    source = ["import", "--from", "npz", str(tmp_path / "a.npz"), "-o", str(tmp_path / "a")]
    assert main([*source, f"--layer-ids={text}"]) == 2
    assert "--layer-ids" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--profile-fraction", "1"], ["--top-k", "2"]])
def test_flags_that_do_not_fit_are_named_and_nothing_is_written(tmp_path, flags, capsys):
    write_npz_trace(planted_trace(seed=1), tmp_path / "a.npz")
    source = ["import", "--from", "npz", str(tmp_path / "a.npz"), "-o", str(tmp_path / "a")]
    assert main([*source, *flags]) == 2
    assert flags[0] in capsys.readouterr().err
    assert main([*source, "--dry-run"]) == 0
    assert not (tmp_path / "a").exists()
