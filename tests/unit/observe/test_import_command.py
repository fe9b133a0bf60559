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
from tests.unit.plan.synthetic import planted_trace

WRITERS = {
    "npz": (write_npz_trace, "trace.npz"),
    "megatron-router-trace": (write_megatron_trace, "traces"),
    "vllm-routed-experts": (write_vllm_trace, "responses.jsonl"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_from_a_foreign_file_to_an_engine_and_back(tmp_path, name, capsys):
    write, file = WRITERS[name]
    write(planted_trace(requests=80, seed=1), tmp_path / file)
    run = tmp_path / "run"
    source = ["import", "--from", name, str(tmp_path / file), "--out", str(run)]
    assert main([*source, "--profile-fraction", "0.5"]) == 0
    plan = ["plan", "--profile", str(run / "profile"), "--holdout", str(run / "holdout")]
    assert main([*plan, "--ep-size", "4", "-o", str(run / "plan"), "--json"]) in (0, 1)
    export = ["export", "--plan", str(run / "plan"), "--to", "sglang"]
    assert main([*export, "--out", str(run / "sglang.json")]) == 0
    found = read_sglang(run / "sglang.json", layer_ids=(0, 1), num_experts=16, ep_size=4)
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


@pytest.mark.parametrize("flags", [["--profile-fraction", "1"], ["--top-k", "2"]])
def test_flags_that_do_not_fit_are_named_and_nothing_is_written(tmp_path, flags, capsys):
    write_npz_trace(planted_trace(seed=1), tmp_path / "a.npz")
    source = ["import", "--from", "npz", str(tmp_path / "a.npz"), "-o", str(tmp_path / "a")]
    assert main([*source, *flags]) == 2
    assert flags[0] in capsys.readouterr().err
    assert main([*source, "--dry-run"]) == 0
    assert not (tmp_path / "a").exists()
