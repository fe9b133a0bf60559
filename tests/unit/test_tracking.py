import json
import math
import socket
import sys
import time

import numpy as np
import pytest

from semantic_ep.artifacts import ModelFingerprint, write_artifact
from semantic_ep.errors import ArtifactError, BackendError, ConfigError
from semantic_ep.tracking import METRICS_FILE, PREFIXES, Tracker
from tests.wandb_offline import OfflineRun

FINGERPRINT = ModelFingerprint(architecture="toy", layer_ids=(1,), num_experts=4, top_k=2)


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch, tmp_path):
    for name in ("API_KEY", "MODE", "PROJECT", "NAME", "RUN_GROUP", "TAGS", "DIR", "BASE_URL"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.delenv("WANDB_IDENTITY_TOKEN_FILE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture
def silent_host():
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]


def test_jsonl_holds_every_number_with_its_step_and_the_configuration(tmp_path):
    config = {"groups": {"ep_size": 2}}
    with Tracker.start(tmp_path, config=config, job_type="train", wandb="disabled") as tracker:
        tracker.log({"train/loss": 3.5, "routing": {"lar": {"layer_00": np.float32(0.5)}}}, step=7)
    start, row, finish = rows(tmp_path)
    assert (start["event"], start["config"]) == ("start", config)
    assert row["train/loss"] == 3.5
    assert row["routing/lar/layer_00"] == 0.5
    assert row["train/step"] == row["routing/step"] == 7
    assert (finish["event"], finish["exit_code"]) == ("finish", 0)
    assert not (tmp_path / "wandb").exists()


def test_a_resumed_run_keeps_its_history(tmp_path):
    for step in (1, 2):
        with Tracker.start(tmp_path, job_type="train", wandb="disabled") as tracker:
            tracker.log({"train/loss": 1.0}, step=step)
    assert [row["train/step"] for row in rows(tmp_path) if "train/loss" in row] == [1, 2]


def test_a_loss_that_is_not_finite_is_recorded_and_the_file_stays_valid_json(tmp_path):
    with Tracker.start(tmp_path, job_type="train", wandb="disabled") as tracker:
        tracker.log({"train/loss": math.nan, "train/norm": math.inf})
    row = json.loads(
        (tmp_path / METRICS_FILE).read_text().splitlines()[1], parse_constant=pytest.fail
    )
    assert (row["train/loss"], row["train/norm"]) == ("nan", "inf")


def test_an_exception_marks_the_run_as_failed(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        Tracker.start(tmp_path, job_type="plan", wandb="disabled"),
    ):
        1 / 0  # noqa: B018
    assert rows(tmp_path)[-1]["exit_code"] == 1


def test_only_the_writer_rank_records(tmp_path):
    tracker = Tracker.start(tmp_path / "other", job_type="train", rank=1)
    tracker.log({"train/loss": 1.0})
    tracker.log_artifact(tmp_path / "absent", "plan")
    tracker.finish()
    assert not tracker.active
    assert not (tmp_path / "other").exists()
    last = {"rank": 3, "writer_rank": 3, "wandb": "disabled"}
    with Tracker.start(tmp_path, job_type="train", **last) as tracker:
        assert tracker.active


def test_an_offline_run_reads_back_with_names_values_axes_config_and_identity(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_PROJECT", "routing-study")
    monkeypatch.setenv("WANDB_NAME", "first")
    monkeypatch.setenv("WANDB_RUN_GROUP", "ablation")
    monkeypatch.setenv("WANDB_TAGS", "ep4,debug")
    config = {"groups": {"ep_size": 4}, "plan": {"policy": "semantic"}}
    with Tracker.start(tmp_path, config=config, job_type="serve") as tracker:
        for step in range(300):
            tracker.log({"train/loss": 9.0 - step / 100}, step=step)
        tracker.log({f"a2a/bytes/rank_{i:02d}": 1000 * i for i in range(40)}, step=5)
    run = OfflineRun.in_directory(tmp_path)
    assert (run.project, run.name, run.group) == ("routing-study", "first", "ablation")
    assert (run.job_type, set(run.tags)) == ("serve", {"ep4", "debug"})
    assert run.config["groups"] == config["groups"]
    assert run.config["plan"] == config["plan"]
    losses = [(row["train/step"], row["train/loss"]) for row in run.history if "train/loss" in row]
    assert losses == [(step, pytest.approx(9.0 - step / 100)) for step in range(300)]
    assert run.history[-1] == {
        "a2a/step": 5,
        **{f"a2a/bytes/rank_{i:02d}": 1000 * i for i in range(40)},
    }
    assert run.axes == {f"{prefix}/*": f"{prefix}/step" for prefix in PREFIXES}


def test_lineage_of_profile_and_plan_survives_offline(tmp_path):
    profile, plan, trace = tmp_path / "profile", tmp_path / "plan", tmp_path / "trace"
    made = {"fingerprint": FINGERPRINT, "arrays": {"x": np.arange(3)}, "meta": {}}
    profile_sha = write_artifact(profile, kind="profile", **made)
    plan_sha = write_artifact(plan, kind="plan", parents={"profile": profile_sha}, **made)
    write_artifact(trace, kind="trace", **made)
    with Tracker.start(tmp_path / "run", job_type="plan") as tracker:
        tracker.log_artifact(profile, "profile", role="input")
        tracker.log_artifact(plan, "plan")
        tracker.log_artifact(trace, "trace")
    events = [row for row in rows(tmp_path / "run") if row["event"] == "artifact"]
    assert [(row["artifact_kind"], row["role"]) for row in events] == [
        ("profile", "input"),
        ("plan", "output"),
        ("trace", "output"),
    ]
    assert events[1]["parents"] == {"profile": events[0]["sha256"]}
    run = OfflineRun.in_directory(tmp_path / "run")
    assert run.config["inputs"]["profile"]["sha256"] == profile_sha
    logged = {artifact["type"]: artifact for artifact in run.artifacts}
    assert logged["plan"]["name"] == "plan-toy"
    assert logged["plan"]["metadata"]["sha256"] == plan_sha
    assert logged["plan"]["metadata"]["parents"] == {"profile": profile_sha}
    assert "manifest.json" in logged["plan"]["uploads"]
    # A raw trace can reveal text: its identity is logged, never its bytes.
    assert logged["trace"]["uploads"] == []


def test_a_run_that_is_open_already_is_joined_and_left_open(tmp_path):
    import wandb

    with wandb.init(
        mode="offline", dir=tmp_path, project="megatron", settings=wandb.Settings(silent=True)
    ) as theirs:
        with Tracker.start(tmp_path, config={"enabled": True}, job_type="train") as tracker:
            for iteration in range(1, 4):
                tracker.log({"routing/lar": 0.1 * iteration}, step=iteration)
                theirs.log({"lm loss": 5 - iteration}, step=10 * iteration)
        assert wandb.run is theirs
    run = OfflineRun.in_directory(tmp_path)
    assert run.project == "megatron"
    assert run.config["semantic_ep"] == {"enabled": True}
    assert [row["lm loss"] for row in run.history if "lm loss" in row] == [4, 3, 2]
    routing = [row["routing/lar"] for row in run.history if "routing/lar" in row]
    assert routing == pytest.approx([0.1, 0.2, 0.3])


def test_pictures_are_recorded(tmp_path):
    from matplotlib.image import imsave

    picture = tmp_path / "load.png"
    imsave(picture, np.zeros((4, 4)))
    with Tracker.start(tmp_path, job_type="report") as tracker:
        tracker.log_image("plan/load", picture)
        with pytest.raises(ArtifactError, match="no picture here"):
            tracker.log_image("plan/load", tmp_path / "absent.png")
    (row,) = OfflineRun.in_directory(tmp_path).history
    (kept,) = tmp_path.glob(f"wandb/offline-run-*/files/{row['plan/load/path']}")
    assert kept.read_bytes() == picture.read_bytes()


def test_a_table_keeps_every_column_and_wandb_gets_one_type_in_each(tmp_path):
    table = [{"layer": 0, "lar": 0.5}, {"layer": "mean", "lar": None, "n": 3, "same": True}]
    with Tracker.start(tmp_path, job_type="benchmark") as tracker:
        tracker.log_table("benchmark/plan/rows", table)
    (event,) = (row for row in rows(tmp_path) if row["event"] == "table")
    assert event["columns"] == ["layer", "lar", "n", "same"]
    assert event["rows"] == [[0, 0.5, None, None], ["mean", None, 3, True]]
    (row,) = OfflineRun.in_directory(tmp_path).history
    file = row["benchmark/plan/rows/path"]
    (kept,) = tmp_path.glob(f"wandb/offline-run-*/files/{file}")
    assert json.loads(kept.read_text())["data"] == [
        ["0", 0.5, None, None],
        ["mean", None, 3, True],
    ]


def test_a_key_without_an_answering_server_records_offline_within_seconds(
    tmp_path, monkeypatch, silent_host
):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", silent_host)
    began = time.monotonic()
    with Tracker.start(tmp_path, job_type="train") as tracker:
        tracker.log({"train/loss": 1.0}, step=0)
    assert time.monotonic() - began < 20
    assert OfflineRun.in_directory(tmp_path).history[0]["train/loss"] == 1.0


def test_wandb_mode_decides_when_the_setting_is_auto(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    Tracker.start(tmp_path, job_type="train").finish()
    assert not (tmp_path / "wandb").exists()
    monkeypatch.setenv("WANDB_MODE", "of-line")
    with pytest.raises(ConfigError, match=r"WANDB_MODE: .*of-line.*Allowed: online, offline"):
        Tracker.start(tmp_path, job_type="train")


def test_online_without_a_key_is_refused_and_never_asks(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot go online without a key.*wandb login"):
        Tracker.start(tmp_path, job_type="train", wandb="online")


def test_an_unknown_setting_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match='Did you mean "offline"'):
        Tracker.start(tmp_path, job_type="train", wandb="ofline")


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"loss": 1.0}, r"named <prefix>/<name>.*Allowed: train/"),
        ({"serve/tokens": 1}, 'Did you mean "serving/tokens"'),
        ({"train/loss": "low"}, "train/loss is no number.*str"),
        ({"train/loss": np.ones(3)}, "train/loss is no number.*ndarray"),
    ],
)
def test_a_wrong_metric_is_refused(tmp_path, metrics, message):
    with (
        Tracker.start(tmp_path, job_type="train", wandb="disabled") as tracker,
        pytest.raises(ConfigError, match=message),
    ):
        tracker.log(metrics)


def test_a_run_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ArtifactError, match="cannot record metrics here"):
        Tracker.start(tmp_path / "run", job_type="train", wandb="disabled")


def test_without_wandb_auto_keeps_the_jsonl_and_a_wish_fails_loudly(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Tracker.start(tmp_path, job_type="train") as tracker:
        tracker.log({"train/loss": 1.0})
    assert rows(tmp_path)[1]["train/loss"] == 1.0
    with pytest.raises(BackendError, match=r"pip install .semantic_ep\[track\]"):
        Tracker.start(tmp_path, job_type="train", wandb="offline")
