"""The sensitivity studies plan on the requests they say, and count the others."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from benchmarks.recorded import by_phase
from benchmarks.run import main
from benchmarks.sensitivity import domains_of, up_to, without_rare
from semantic_ep.observe.formats import read_npz_trace, write_npz_trace
from semantic_ep.observe.profile import RoutingProfile
from tests.unit.plan.synthetic import planted_trace


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory):
    """Requests of four topics, which two labels share."""
    file = tmp_path_factory.mktemp("traces") / "toy.npz"
    trace = planted_trace(requests=120, layers=3, seed=1)
    write_npz_trace(trace, file)
    topic = trace.token_id[trace.offsets[:-1]] % 4
    labels = [json.dumps({"subject": f"topic {number}"}) for number in topic]
    file.with_name("toy.requests.jsonl").write_text("\n".join(labels))
    return file


def run_rows(trace_file, tmp_path, *flags):
    command = ["plan_sensitivity", "--trace", str(trace_file), "--at-ep", "4", "--layers", "1"]
    command += ["--evaluate-tokens", "1500", "--json", str(tmp_path / "out.json"), *flags]
    assert main(command) == 0
    document = json.loads((tmp_path / "out.json").read_text())
    assert {row["layer"] for row in document["rows"]} == {1, "mean"}
    return [row for row in document["rows"] if row["layer"] == "mean"]


def test_each_part_of_a_plan_is_measured_alone(trace_file, tmp_path):
    rows = run_rows(trace_file, tmp_path, "--studies", "ablations", "--redundant-slots", "4")
    saved = {row["setting"]: row["saved"] for row in rows}
    assert saved["neither"] == 0
    assert max(saved["placement alone"], saved["schedule alone"]) < saved["both"]
    assert saved["both"] <= saved["true routes"]
    assert saved["4 slots for copies"] > 0
    assert (tmp_path / "out.png").exists()


def test_profiles_are_nested_and_ep_degrees_divide_the_experts(trace_file, tmp_path):
    rows = run_rows(
        trace_file, tmp_path, "--studies", "profile size", "EP degree", "minimum count",
        "--fractions", "0.1", "0.2", "--ep", "3", "16", "--min-counts", "2",
    )  # fmt: skip
    sizes = [row["profiled_tokens"] for row in rows if row["study"] == "profile size"]
    assert sizes == [12 * 48, 24 * 48]
    assert [row["ep_size"] for row in rows if row["study"] == "EP degree"] == [16]
    assert all(0 < row["lar"] <= 1 and row["plan_seconds"] > 0 for row in rows)


def test_the_search_varies_effort_and_allowed_load_around_the_usual_plan(trace_file, tmp_path):
    rows = {row["setting"]: row for row in run_rows(trace_file, tmp_path, "--studies", "search")}
    usual = rows["1x steps and starts"]
    assert {row["value"] for row in rows.values()} >= {0.1, 4.0, 1.05, 1.3}
    same = ("lar", "remote_copies", "load_max_over_mean")
    assert [rows["load up to 1.15"][name] for name in same] == [usual[name] for name in same]
    assert (
        rows["0.1x steps and starts"]["plan_seconds"] < rows["4x steps and starts"]["plan_seconds"]
    )
    loads = [rows[f"load up to {load}"]["load_max_over_mean"] for load in ("1.05", "1.3")]
    assert loads[0] <= loads[1] + 1e-9


def test_a_plan_is_worth_most_on_the_domain_it_was_made_from(trace_file, tmp_path):
    (tmp_path / "domains.json").write_text(
        json.dumps({"even": ["topic 0", "topic 2"], "odd": ["topic 1", "topic 3"]})
    )
    rows = run_rows(
        trace_file, tmp_path, "--studies", "domains", "--labels", "subject",
        "--domains", str(tmp_path / "domains.json"),
    )  # fmt: skip
    lar = {(row["setting"], row["counted_on"]): row["lar"] for row in rows}
    assert set(lar) == {(a, b) for a in ("even", "odd", "all domains") for b in ("even", "odd")}
    assert lar["even", "even"] > lar["odd", "even"] + 0.1
    assert lar["odd", "odd"] > lar["even", "odd"] + 0.1


def test_documents_of_a_quickstart_are_profiled_and_those_held_out_are_counted(
    quickstart, tmp_path
):
    output = tmp_path / "out.json"
    command = ["plan_sensitivity", "--run", str(quickstart), "--at-ep", "2", "--layers", "1"]
    command += ["--studies", "profile size", "domains", "--fractions", "0.5", "1", "--labels"]
    command += ["kind", "--max-tokens", "20", "--redundant-slots", "2", "--json", str(output)]
    assert main(command) == 0
    rows = [r for r in json.loads(output.read_text())["rows"] if r["layer"] == "mean"]
    assert {row["trace"] for row in rows} == {quickstart.name}
    # 12 documents were trained on, of which 20 tokens each are seen.
    sizes = [row["profiled_tokens"] for row in rows if row["study"] == "profile size"]
    assert sizes == [6 * 20, 12 * 20]
    domains = {(r["setting"], r["counted_on"]) for r in rows if r["study"] == "domains"}
    assert domains == {
        (a, b) for a in ("python", "english", "all domains") for b in ("python", "english")
    }


def test_phases_are_domains_of_a_model_that_goes_on_from_its_documents(quickstart, tmp_path):
    output = tmp_path / "out.json"
    command = ["plan_sensitivity", "--run", str(quickstart), "--at-ep", "2", "--layers", "1"]
    command += ["--studies", "domains", "--labels", "phase", "--max-tokens", "12"]
    command += ["--new-tokens", "8", "--redundant-slots", "2", "--json", str(output)]
    assert main(command) == 0
    rows = [r for r in json.loads(output.read_text())["rows"] if r["layer"] == "mean"]
    assert {(r["setting"], r["counted_on"]) for r in rows} == {
        (a, b) for a in ("decode", "prefill", "all domains") for b in ("decode", "prefill")
    }
    # Twelve training documents of 8 new tokens each: every plan sees as much as there is of these.
    assert {row["profiled_tokens"] for row in rows if row["setting"] == "decode"} == {12 * 8}


def test_a_request_is_its_beginning_and_what_followed():
    trace = planted_trace(requests=3, seed=1)
    trace = dataclasses.replace(trace, requests=({"kind": "a"}, {"kind": "b"}, {"kind": "c"}))
    phases = by_phase(trace, 5)
    lengths = np.diff(trace.offsets)
    assert np.diff(phases.offsets).tolist() == [n for one in lengths for n in (one - 5, 5)]
    assert phases.requests[:2] == (
        {"kind": "a", "phase": "prefill"},
        {"kind": "a", "phase": "decode"},
    )


def test_something_to_plan_on_is_asked_for(capsys):
    assert main(["plan_sensitivity"]) == 2
    assert "--trace, --run: there is nothing to plan on" in capsys.readouterr().err


def test_labels_are_domains_where_none_are_listed(trace_file):
    trace = read_npz_trace(trace_file)
    found = domains_of(trace, key="subject", domains=None)
    assert list(found) == [f"topic {number}" for number in range(4)]
    assert sum(map(len, found.values())) == trace.num_requests


def test_requests_are_taken_until_tokens_are_reached(trace_file):
    trace = read_npz_trace(trace_file)
    order = np.arange(120)[::-1]
    assert up_to(trace, order, 100).tolist() == [119, 118]
    assert up_to(trace, order, 1).tolist() == [119]


def test_cells_below_the_minimum_count_are_dropped(trace_file):
    profile = RoutingProfile.from_trace(read_npz_trace(trace_file))
    kept = without_rare(profile, 20)
    for table, before, dropped in zip(kept.token_expert, profile.token_expert, kept.dropped_mass):
        assert table.data.min() >= 20
        assert dropped == pytest.approx(1 - table.sum() / before.sum())


@pytest.mark.parametrize("flags", [("--at-ep", "5"), ("--redundant-slots", "3")])
def test_settings_that_do_not_divide_are_refused(trace_file, flags, capsys):
    assert main(["plan_sensitivity", "--trace", str(trace_file), "--at-ep", "4", *flags]) == 2
    assert flags[0] in capsys.readouterr().err
