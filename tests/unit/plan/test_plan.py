from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from semantic_ep.artifacts import write_artifact
from semantic_ep.cli import main
from semantic_ep.errors import ArtifactError
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan.compared import BASELINES
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.plan import Plan
from semantic_ep.plan.schedule import Schedule
from semantic_ep.tracking import METRICS_FILE
from tests.unit.plan.synthetic import planted_trace
from tests.wandb_offline import OfflineRun


@pytest.fixture
def profile():
    return RoutingProfile.from_trace(planted_trace(seed=1), vocab_size=80)


def _plan(profile: RoutingProfile, ep_size: int = 4) -> Plan:
    placement = Placement.contiguous(num_layers=2, num_experts=16, ep_size=ep_size)
    return Plan(
        placement=placement,
        schedule=Schedule.from_profile(profile, placement),
        verdict={"worth_it": False},
        fingerprint=profile.fingerprint,
    )


def test_a_plan_survives_the_disk(profile, tmp_path):
    plan = _plan(profile)
    digest = plan.save(tmp_path / "plan", {"profile": "abc"})
    read = Plan.read(tmp_path / "plan")
    assert read.sha256 == digest
    assert read.verdict == plan.verdict
    for name, table in plan.schedule.arrays().items():
        np.testing.assert_array_equal(read.schedule.arrays()[name], table)
        assert read.schedule.arrays()[name].dtype == table.dtype


def test_a_plan_of_parts_that_do_not_fit_is_refused(profile):
    plan = _plan(profile)
    with pytest.raises(ArtifactError, match="do not fit"):
        dataclasses.replace(plan, schedule=_plan(profile, 8).schedule)


@pytest.mark.parametrize(
    ("lacking", "missing"),
    [("ep_size", "ep_size"), ("physical", "physical_to"), ("schedule.conf", "confidence")],
)
def test_a_plan_on_disk_that_lacks_a_part_is_refused(profile, tmp_path, lacking, missing):
    plan = _plan(profile)
    arrays = {"physical_to_logical_map": plan.placement.physical_to_logical_map}
    arrays |= {f"schedule.{name}": table for name, table in plan.schedule.arrays().items()}
    meta = {"ep_size": 4, "verdict": {}}
    write_artifact(
        tmp_path / "plan",
        kind="plan",
        fingerprint=plan.fingerprint,
        arrays={name: table for name, table in arrays.items() if not name.startswith(lacking)},
        meta={name: value for name, value in meta.items() if name != lacking},
    )
    with pytest.raises(ArtifactError, match=f"malformed plan: .*{missing}"):
        Plan.read(tmp_path / "plan")


def test_a_schedule_of_other_layers_is_refused(profile):
    plan = _plan(profile)
    tables = plan.schedule.arrays() | {"token_to_rank": plan.schedule.token_to_rank[:1]}
    with pytest.raises(ArtifactError, match=r"schedule of \(layers, ranks\) \(1, 4\)"):
        dataclasses.replace(plan, schedule=Schedule(**tables))


def test_the_table_sends_a_token_where_most_of_its_experts_are(profile):
    plan = _plan(profile)
    token = int(np.argmax(profile.token_count))
    for layer in range(2):
        counts = profile.token_expert[layer][[token]].toarray()[0].reshape(4, 4).sum(axis=1)
        assert plan.schedule.token_to_rank[layer, token] == counts.argmax()
        share = plan.schedule.confidence[layer, token] / 255
        assert share == pytest.approx(counts.max() / counts.sum(), abs=0.1)
    assert (plan.schedule.token_to_rank[:, 79] == -1).all()
    assert (plan.schedule.confidence[:, 79] == 0).all()


def test_a_request_scores_the_sum_of_its_tokens_and_unknown_ids_tell_nothing(profile):
    schedule = _plan(profile).schedule
    ids = np.array([1, 2, 2])
    once = schedule.request_score(ids)
    assert once.sum() == pytest.approx(3, abs=0.02)
    np.testing.assert_allclose(schedule.request_score(np.array([1, 2, 2, -1, 500])), once)


@pytest.fixture
def run_dir(tmp_path):
    RoutingProfile.from_trace(planted_trace(seed=1)).save(tmp_path / "profile")
    planted_trace(seed=2).save(tmp_path / "holdout")
    return tmp_path


def _arguments(run_dir, *more: str) -> list[str]:
    return [
        "plan",
        *("--profile", str(run_dir / "profile")),
        *("--holdout", str(run_dir / "holdout")),
        *("--ep-size", "4", "-o", str(run_dir / "plan")),
        *more,
    ]


def test_the_command_writes_a_plan_with_its_verdict_and_parent(run_dir, capsys):
    assert main(_arguments(run_dir, "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["verdict"]["worth_it"]
    plan = Plan.read(run_dir / "plan")
    assert plan.sha256 == printed["sha256"]
    names = {row["policy"] for row in plan.verdict["policies"]}
    assert names == {*BASELINES, "semantic"}
    best = plan.verdict["best_baseline"]
    assert best == printed["verdict"]["best_baseline"]
    assert best["policy"] in BASELINES


def test_the_command_prints_the_best_baseline_and_which_ceiling_it_states(run_dir, capsys):
    assert main(_arguments(run_dir, "--dry-run", "--baselines", "eplb", "occult")) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "the best of 3 baselines" in printed
    assert "not among the baselines: semmoe, not asked for" in printed
    assert "ceiling of other placements: not sought" in printed
    more = ["--baselines", "contiguous", "--ceiling", "placement", "--json"]
    assert main(_arguments(run_dir, "--dry-run", *more)) == 0
    verdict = json.loads(capsys.readouterr().out)["verdict"]
    assert verdict["best_baseline"]["policy"] == "contiguous"
    bounds, reached = verdict["bounds"], verdict["policies"][-1]
    assert reached["lar"] <= bounds["ceiling_lar"] <= bounds["placement_ceiling_lar"]
    least = bounds["placement_ceiling_remote_copies"]
    assert least <= bounds["ceiling_remote_copies"] <= reached["remote_copies"]


def test_an_unknown_baseline_is_named_with_the_nearest_one(run_dir, capsys):
    assert main(_arguments(run_dir, "--baselines", "ocult")) == 2
    assert 'Did you mean "occult"' in capsys.readouterr().err


def test_a_tracked_plan_names_its_profile_and_the_report_names_the_plan(run_dir, monkeypatch):
    for package in ("wandb", "matplotlib", "jinja2"):
        pytest.importorskip(package)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert main(_arguments(run_dir, "--wandb", "offline")) == 0
    planning = OfflineRun.in_directory(run_dir)
    profile_sha = RoutingProfile.read(run_dir / "profile").sha256
    plan = Plan.read(run_dir / "plan")
    assert (planning.job_type, planning.config["ep_size"]) == ("plan", 4)
    assert planning.config["inputs"]["profile"]["sha256"] == profile_sha
    logged = {artifact["type"]: artifact for artifact in planning.artifacts}
    assert logged["plan"]["metadata"]["sha256"] == plan.sha256
    assert logged["plan"]["metadata"]["parents"] == {"profile": profile_sha}
    assert planning.axes["plan/*"] == "plan/step"
    key = "plan/remote_copies_saved"
    (saved,) = [row[key] for row in planning.history if key in row]
    assert saved == pytest.approx(plan.verdict["remote_copies_saved"])

    report = run_dir / "drawn"
    assert main(["report", str(run_dir), "-o", str(report), "--wandb", "offline"]) == 0
    drawn = OfflineRun.in_directory(report)
    assert drawn.config["inputs"]["plan"]["sha256"] == plan.sha256
    assert drawn.config["inputs"]["profile"]["sha256"] == profile_sha
    events = [json.loads(line) for line in (report / METRICS_FILE).read_text().splitlines()]
    (table,) = [event for event in events if event.get("event") == "table"]
    assert table["name"] == "plan/policies"
    best = dict(zip(table["columns"], table["rows"][-1], strict=True))
    assert (best["policy"], best["schedule"]) == ("semantic", "by affinity")


def test_a_dry_run_is_not_recorded(run_dir, capsys):
    assert main(_arguments(run_dir, "--dry-run", "--wandb", "offline")) == 2
    assert "a dry run is not recorded" in capsys.readouterr().err
    assert not (run_dir / METRICS_FILE).exists()


def test_a_dry_run_writes_nothing(run_dir, capsys):
    assert main(_arguments(run_dir, "--dry-run")) == 0
    assert "dry run" in capsys.readouterr().out
    assert not (run_dir / "plan").exists()


def test_the_effect_on_time_needs_both_sizes(run_dir, capsys):
    assert main(_arguments(run_dir, "--hidden-size", "64")) == 2
    assert "--expert-bytes" in capsys.readouterr().err


def test_an_unknown_policy_is_named_with_the_nearest_one(run_dir, capsys):
    assert main(_arguments(run_dir, "--policy", "semantik")) == 2
    assert 'Did you mean "semantic"' in capsys.readouterr().err


def test_simulate_counts_a_trace_and_advises_on_drift(run_dir, capsys):
    main(_arguments(run_dir, "--json"))
    capsys.readouterr()
    simulate = ["simulate", "--plan", str(run_dir / "plan"), "--json"]
    known = ["--trace", str(run_dir / "holdout"), "--profile", str(run_dir / "profile")]
    assert main([*simulate, *known]) == 0
    rows = json.loads(capsys.readouterr().out)["cost"]
    planned = Plan.read(run_dir / "plan").verdict["policies"][-1]
    assert rows[-1]["remote_copies"] == pytest.approx(planned["remote_copies"])
    fresh = ["--fresh", str(run_dir / "profile"), "--profile", str(run_dir / "profile")]
    sizes = ["--horizon-tokens", "1000", "--hidden-size", "64", "--expert-bytes", "1000000"]
    assert main([*simulate, *fresh, *sizes]) == 0
    assert not json.loads(capsys.readouterr().out)["drift"]["replan"]
    assert main(simulate) == 2
    assert "nothing to simulate" in capsys.readouterr().err
