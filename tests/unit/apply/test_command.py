from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from semantic_ep.apply.checkpoint import checkpoint_fingerprint
from semantic_ep.apply.checkpoint.rewrite import LAYOUT_DIRECTORY
from semantic_ep.artifacts import read_artifact
from semantic_ep.cli import main
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.plan import Plan
from semantic_ep.plan.schedule import Schedule
from semantic_ep.tracking import METRICS_FILE
from tests.wandb_offline import OfflineRun


@pytest.fixture
def source(tmp_path, write_checkpoint) -> Path:
    return write_checkpoint(tmp_path / "model")


@pytest.fixture
def plan(tmp_path, source) -> Path:
    fingerprint = checkpoint_fingerprint(source)
    rows = np.array([[2, 0, 3, 1]] * fingerprint.num_layers)
    save_plan(tmp_path / "plan", fingerprint, rows)
    return tmp_path / "plan"


def save_plan(path: Path, fingerprint, rows: np.ndarray, ep_size: int = 2) -> None:
    layers, vocab = fingerprint.num_layers, 11
    Plan(
        placement=Placement(
            physical_to_logical_map=rows, num_experts=fingerprint.num_experts, ep_size=ep_size
        ),
        schedule=Schedule(
            token_to_rank=np.zeros((layers, vocab), np.int8),
            confidence=np.zeros((layers, vocab), np.uint8),
            request_affinity=np.full((vocab, ep_size), 1 / ep_size, np.float16),
        ),
        verdict={},
        fingerprint=fingerprint,
    ).save(path)


def test_apply_and_undo_round_trip(tmp_path, source, plan, tree, capsys) -> None:
    applied, undone = tmp_path / "applied", tmp_path / "undone"
    arguments = ["apply", "--checkpoint", str(source), "--plan", str(plan), "-o", str(applied)]
    assert main(arguments) == 0
    assert "2 MoE layers x 4 experts in the order of the plan, 8 of 8" in capsys.readouterr().out
    parents = read_artifact(applied / LAYOUT_DIRECTORY).parents
    assert parents == {"plan": read_artifact(plan).sha256}
    assert main(["apply", "--checkpoint", str(applied), "--undo", "-o", str(undone)]) == 0
    assert "in logical order" in capsys.readouterr().out
    assert tree(undone) == tree(source)


def test_a_recorded_checkpoint_names_its_plan_and_the_one_it_was_made_of(
    tmp_path, source, plan, capsys
) -> None:
    output = tmp_path / "applied"
    arguments = ["apply", "--checkpoint", str(source), "--plan", str(plan), "--wandb", "offline"]
    assert main([*arguments, "-o", str(output)]) == 0
    rows = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    artifacts = [row for row in rows if row.get("event") == "artifact"]
    assert [(row["artifact_kind"], row["role"], row["path"]) for row in artifacts] == [
        ("checkpoint", "input", str(source)),
        ("plan", "input", str(plan)),
        ("checkpoint", "output", str(output)),
    ]
    run = OfflineRun.in_directory(tmp_path)
    assert run.job_type == "apply"
    assert run.config["inputs"]["plan"]["sha256"] == read_artifact(plan).sha256
    (written,) = run.artifacts
    assert (written["type"], written["metadata"]["path"]) == ("checkpoint", str(output))
    # A checkpoint is referred to, never uploaded.
    assert written["uploads"] == []
    assert main([*arguments, "-o", str(tmp_path / "no"), "--dry-run"]) == 2
    assert "a dry run is not recorded" in capsys.readouterr().err


def test_json_output_is_one_object_and_a_dry_run_writes_nothing(
    tmp_path, source, plan, tree, capsys
) -> None:
    before = tree(tmp_path)
    arguments = ["apply", "--checkpoint", str(source), "--plan", str(plan)]
    assert main([*arguments, "-o", str(tmp_path / "applied"), "--dry-run", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["dry_run"]
    assert not summary["undo"]
    assert (summary["layers"], summary["experts"], summary["moved"]) == (2, 4, 8)
    assert tree(tmp_path) == before


def test_files_left_out_are_named(tmp_path, source, plan, capsys) -> None:
    (source / "pytorch_model.bin").write_bytes(b"x")
    arguments = ["apply", "--checkpoint", str(source), "--plan", str(plan)]
    assert main([*arguments, "-o", str(tmp_path / "applied")]) == 0
    assert "Left out, as it is not permuted: pytorch_model.bin" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--undo", "--plan", "somewhere"]])
def test_either_a_plan_or_undo_must_be_given(tmp_path, source, flags, capsys) -> None:
    arguments = ["apply", "--checkpoint", str(source), "-o", str(tmp_path / "out"), *flags]
    assert main(arguments) == 2
    assert "either a plan to apply or --undo" in capsys.readouterr().err


def test_a_plan_with_replicas_is_refused(tmp_path, source, capsys) -> None:
    fingerprint = checkpoint_fingerprint(source)
    rows = np.array([[0, 1, 2, 1, 2, 3]] * fingerprint.num_layers)
    save_plan(tmp_path / "plan", fingerprint, rows)
    arguments = ["apply", "--checkpoint", str(source), "--plan", str(tmp_path / "plan")]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 2
    assert "layer 0 has 2 copies of expert 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_altered_plan_is_refused(tmp_path, source, plan, capsys) -> None:
    data = next(plan.glob("*.safetensors"))
    data.write_bytes(data.read_bytes()[:-1] + b"\xff")
    arguments = ["apply", "--checkpoint", str(source), "--plan", str(plan)]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 2
    assert "truncated or altered" in capsys.readouterr().err


def test_applying_needs_no_torch(tmp_path, source, plan) -> None:
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from semantic_ep.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["apply", "--checkpoint", str(source), "--plan", str(plan)]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, "-o", str(tmp_path / "applied")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "applied" / LAYOUT_DIRECTORY / "manifest.json").exists()
