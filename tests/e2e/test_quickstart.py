"""The main job, small: every stage is the command of the README, on real text and real ranks."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from semantic_ep.apply.checkpoint import Checkpoint
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.plan import Plan
from semantic_ep.tracking import METRICS_FILE
from tests.wandb_offline import OfflineRun

ROOT = Path(__file__).parents[2]
NAME = "tests/quickstart"
pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def finished():
    """Output and directory of one run of `quickstart.sh --fast`."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SEMANTIC_EP_")}
    done = subprocess.run(
        ["bash", "launch/quickstart.sh", "--fast", "--cpu", "--run", NAME],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout, ROOT / "runs" / NAME


def test_the_last_lines_state_what_the_counters_say(finished):
    output, run = finished
    serve = json.loads((run / "serve.json").read_text())
    lines = {
        "local activation rate": [np.mean(serve["modes"][m]["lar"]) for m in serve["modes"]],
        "remote copies a token": [
            np.mean(serve["modes"][m]["remote_copies"]) for m in serve["modes"]
        ],
    }
    assert list(serve["modes"]) == ["contiguous", "semantic"]
    for label, expected in lines.items():
        row = re.search(rf"^{label}\s+([\d.]+)\s+([\d.]+)", output, re.MULTILINE)
        assert row is not None, output[-2000:]
        assert [float(value) for value in row.groups()] == pytest.approx(expected, abs=6e-4)
    assert "Outputs identical between modes: yes" in output


def test_loss_falls_and_outputs_stay_the_same(finished):
    _, run = finished
    rows = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    same = json.loads((run / "serve.json").read_text())["identical_outputs"]
    assert same["between_modes"] is True
    assert same["to_single_process"] is True
    assert same["checked_requests"] > 0


def test_semantic_placement_sends_fewer_copies_and_ranks_hold_their_share(finished):
    _, run = finished
    serve = json.loads((run / "serve.json").read_text())
    plain, semantic = serve["modes"]["contiguous"], serve["modes"]["semantic"]
    assert np.mean(semantic["remote_copies"]) < np.mean(plain["remote_copies"])
    for mode in (plain, semantic):
        assert (
            mode["expert_bytes_resident"]
            == [mode["expert_bytes_total"] // serve["ep_size"]] * serve["ep_size"]
        )


def test_every_artefact_is_readable_and_of_one_model(finished):
    _, run = finished
    profile = RoutingProfile.read(run / "profile")
    trace = RoutingTrace.load(run / "holdout")
    plan = Plan.read(run / "plan")
    checkpoint = Checkpoint.open(run / "model")
    for other in (trace.fingerprint, plan.fingerprint, checkpoint.fingerprint()):
        profile.fingerprint.check(other, what="an artefact of the run")
    assert profile.load.sum() == pytest.approx(
        profile.tokens * profile.fingerprint.top_k * profile.fingerprint.num_layers, rel=1e-6
    )


def test_the_report_opens_with_the_verdict_and_needs_nothing_from_outside(finished):
    _, run = finished
    html = (run / "report.html").read_text()
    assert json.loads((run / "report.json").read_text())["headline"]
    assert "<script" not in html
    assert not re.search(r"""(?:src|href)=["']https?://""", html)
    assert len(html) < 3_000_000


def test_the_records_tell_the_way_from_the_run_to_what_was_served(finished):
    _, run = finished
    rows = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    lineage = [
        (row["job_type"], row["role"], row["artifact_kind"], Path(row["path"]).name)
        for row in rows
        if row.get("event") == "artifact"
    ]
    assert lineage == [
        ("train", "output", "profile", "profile"),
        ("train", "output", "checkpoint", "model"),
        ("plan", "input", "profile", "profile"),
        ("plan", "output", "plan", "plan"),
        ("apply", "input", "checkpoint", "model"),
        ("apply", "input", "plan", "plan"),
        ("apply", "output", "checkpoint", "applied"),
        ("serve", "input", "checkpoint", "model"),
        ("serve", "input", "plan", "plan"),
        ("report", "input", "profile", "profile"),
        ("report", "input", "plan", "plan"),
        ("report", "output", "report", "report.html"),
    ]
    made = {row["artifact_kind"]: row for row in rows if row.get("role") == "output"}
    assert made["plan"]["parents"]["profile"] == made["profile"]["sha256"]
    names = {name.split("/")[0] for row in rows for name in row if "/" in name}
    assert names >= {"train", "routing", "plan", "a2a", "serving"}


def test_training_metrics_are_in_an_offline_wandb_run(finished):
    _, run = finished
    files = list(run.glob("wandb/offline-run-*/run-*.wandb"))
    if not files:
        pytest.skip("wandb is not installed, or WANDB_MODE is set")
    runs = [OfflineRun.read(file) for file in files]
    assert any("train/loss" in row for run in runs if run is not None for row in run.history)
