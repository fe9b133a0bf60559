"""The runner: comparing with another commit, and running all themes."""

from __future__ import annotations

import json
import subprocess

import pytest

from benchmarks import all_themes
from benchmarks.base import ROOT, comparison
from benchmarks.registry import themes
from benchmarks.run import main
from semantic_ep.tracking import METRICS_FILE
from tests.wandb_offline import OfflineRun

SMALL = ["apply", *all_themes._FLAGS["apply"][1], "--experts", "4"]


def test_rows_of_two_commits_are_matched_by_their_texts_and_order():
    before = {
        "commit": "abc",
        "rows": [
            {"method": "a", "lar": 0.5, "n": 3},
            {"method": "a", "lar": 0.4, "n": 3},
            {"method": "gone", "lar": 0.1, "n": 3},
        ],
    }
    now = [
        {"method": "b", "lar": 9.0, "n": 3},
        {"method": "a", "lar": 0.5, "n": 3},
        {"method": "a", "lar": 0.2, "n": 3},
    ]
    table = comparison(before, now)
    assert table.title == "Against abc; 2 rows are of one commit only"
    lar, n = table.rows
    assert (lar["column"], lar["rows"], lar["equal"]) == ("lar", 2, 1)
    assert (lar["smallest"], lar["largest"]) == (0.5, 1.0)
    assert (n["column"], n["equal"]) == ("n", 2)


@pytest.fixture
def commit():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode:
        pytest.skip("git is not usable here")
    return head.stdout.strip()


def test_base_runs_the_same_theme_in_a_worktree_and_leaves_none(commit, tmp_path, capsys):
    output = tmp_path / "out.json"
    assert main([*SMALL, "--base", commit, "--json", str(output)]) == 0
    document = json.loads(output.read_text())
    assert document["protocol"]["base"].rstrip("+") == commit[:12]
    table = document["tables"][-1]
    assert table["title"].startswith(f"Against {commit[:12]}")
    assert table["title"].endswith("; 0 rows are of one commit only")
    assert table["rows"]
    listed = subprocess.run(
        ["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "/base " not in listed.stdout


def test_a_commit_that_does_not_exist_is_refused(commit, capsys):
    assert main([*SMALL, "--base", "no-such-commit"]) == 2
    assert "--base no-such-commit" in capsys.readouterr().err


def test_all_writes_named_results_and_skips_what_needs_recordings(tmp_path, capfd):
    arguments = ["all", "--quick", "--output", str(tmp_path), "--only", "apply", "scale"]
    assert main(arguments) == 0
    assert "scale: skipped, needs --data" in capfd.readouterr().out
    (result,) = tmp_path.glob("apply_cpu_*.json")
    document = json.loads(result.read_text())
    assert document["theme"] == "apply"
    assert {"environment", "commit", "seed", "protocol", "rows", "command"} <= set(document)
    assert len(list(tmp_path.glob("apply_cpu_*.md"))) == 1


def test_a_theme_that_fails_makes_all_fail(tmp_path, capfd):
    missing = ["all", "--data", str(tmp_path), "--output", str(tmp_path), "--only", "plan_bounds"]
    assert main(missing) == 1
    assert "plan_bounds: failed (2)" in capfd.readouterr().out


def test_every_flag_that_all_passes_exists(tmp_path):
    from benchmarks.run import _parser

    (tmp_path / "model").mkdir()
    for theme in themes():
        for quick in (False, True):
            arguments = all_themes.command(theme, quick=quick, data=tmp_path, run=tmp_path)
            assert _parser(theme).parse_args(arguments).theme == theme


def test_all_says_what_each_skipped_theme_needs(tmp_path):
    run = tmp_path / "no-run"
    whole = {
        theme: all_themes.command(theme, quick=False, data=None, run=run) for theme in themes()
    }
    without_model = f"needs --run, and launch/quickstart.sh has left no model in {run}"
    assert {theme for theme, needs in whole.items() if needs == without_model} == {
        "lookahead", "serve", "serve_phases", "serve_prefix", "slow_links",
    }  # fmt: skip
    assert whole["plan"] == "needs --data"
    assert whole["apply"] == ["apply"]
    quick = all_themes.command("slow_links", quick=True, data=None, run=run)
    assert quick == ["slow_links", "--quick"]
    (run / "model").mkdir(parents=True)
    whole = all_themes.command("serve", quick=False, data=None, run=run)
    assert whole == ["serve", "--run", str(run)]


def test_all_skips_a_theme_that_this_machine_cannot_run_with_its_reason(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr("benchmarks.bench_slow_links.why_not", lambda: "no rights here")
    assert main(["all", "--quick", "--output", str(tmp_path), "--only", "slow_links"]) == 0
    assert "slow_links: skipped, no rights here" in capfd.readouterr().out
    assert not list(tmp_path.glob("slow_links*"))


def test_a_tracked_result_reads_back_from_an_offline_run_with_tables_chart_and_artefact(
    tmp_path, monkeypatch
):
    for name, value in {"PROJECT": "evidence", "NAME": "mine", "RUN_GROUP": "v1"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("WANDB_TAGS", "cpu,quick")
    folder = tmp_path / "tracked"
    assert main([*SMALL, "--track", str(folder), "--wandb", "offline"]) == 0
    document = json.loads((folder / "apply.json").read_text())
    run = OfflineRun.in_directory(folder)
    assert (run.project, run.name, run.group) == ("evidence", "mine", "v1")
    assert (run.job_type, set(run.tags)) == ("benchmark", {"cpu", "quick"})
    assert run.axes["benchmark/*"] == "benchmark/step"
    assert run.config["protocol"] == json.loads(json.dumps(document["protocol"]))
    assert run.config["commit"] == document["commit"]
    assert run.config["arguments"]["hidden"] == "64" or run.config["arguments"]["hidden"] == 64
    recorded = {name for row in run.history for name in row}
    assert {"benchmark/apply/rows/nrows", "benchmark/apply/charts/path"} <= recorded
    (artifact,) = (one for one in run.artifacts if one["type"] == "benchmark")
    assert artifact["uploads"] == ["apply.json"]
    events = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    (rows,) = [event for event in events if event.get("name") == "benchmark/apply/rows"]
    assert [dict(zip(rows["columns"], row, strict=True)) for row in rows["rows"]] == [
        {**dict.fromkeys(rows["columns"]), **row} for row in document["rows"]
    ]
