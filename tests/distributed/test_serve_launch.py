import dataclasses
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from semantic_ep.apply.checkpoint import checkpoint_fingerprint
from semantic_ep.errors import SemanticEPError
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.plan import Plan
from semantic_ep.plan.schedule import Schedule
from semantic_ep.tracking import METRICS_FILE
from tests.distributed.launcher import run_ranks
from tests.distributed.test_serve_engine import EXPERTS, LAYERS, VOCAB, save_tiny_model

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).parents[2] / "launch" / "serve.py"
RANKS = 2


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A tiny model with a tokenizer, a plan for it and prompts of two kinds."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("serve")
    save_tiny_model(root / "model", "qwen3_moe")
    words = {f"w{index}": index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(root / "model")

    draw = np.random.default_rng(0)
    ranks = np.stack([draw.permutation(np.arange(EXPERTS) % RANKS) for _ in range(LAYERS)])
    affinity = np.full((VOCAB, RANKS), 0.5, dtype=np.float16)
    affinity[: VOCAB // 2] = [0.9, 0.1]
    affinity[VOCAB // 2 :] = [0.1, 0.9]
    for name, rank_of_expert in (("plan", ranks), ("decode-plan", 1 - ranks)):
        Plan(
            placement=Placement.from_rank_of_expert(rank_of_expert, ep_size=RANKS),
            schedule=Schedule(
                token_to_rank=np.zeros((LAYERS, VOCAB), dtype=np.int8),
                confidence=np.zeros((LAYERS, VOCAB), dtype=np.uint8),
                request_affinity=affinity,
            ),
            verdict={},
            fingerprint=checkpoint_fingerprint(root / "model"),
        ).save(root / name)
    with (root / "prompts.jsonl").open("w") as stream:
        for number in range(6):
            low, high = ((3, VOCAB // 2), (VOCAB // 2, VOCAB))[number % 2]
            text = " ".join(f"w{draw.integers(low, high)}" for _ in range(8))
            stream.write(json.dumps({"id": number, "kind": number % 2, "text": text}) + "\n")
    return root


def arguments(run_dir, out, *more):
    return [
        *("--model", str(run_dir / "model"), "--plan", str(run_dir / "plan")),
        *("--prompts", str(run_dir / "prompts.jsonl"), "--out", str(out / "serve.json")),
        *("--max-new-tokens", "4", "--rounds", "2", "--compare", "contiguous", "semantic"),
        *("--semantic-ep-tracking-wandb", "disabled", *more),
    ]


def _launch_script():
    specification = importlib.util.spec_from_file_location("launch_serve", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def _main(rank, ranks, argv):
    return _launch_script().main(argv)


def test_both_modes_are_served_checked_and_written(run_dir, tmp_path):
    from semantic_ep.report.sources import ServeResult

    responses = tmp_path / "responses.jsonl"
    argv = arguments(run_dir, tmp_path, "--responses", str(responses))
    assert run_ranks(_main, RANKS, argv) == [0, 0]

    written = json.loads((tmp_path / "serve.json").read_text())
    ServeResult.model_validate(written)
    fingerprint = json.loads(
        json.dumps(dataclasses.asdict(checkpoint_fingerprint(run_dir / "model")))
    )
    assert written["model"] == fingerprint
    same = {"between_modes": True, "to_single_process": True, "checked_requests": 6}
    assert written["identical_outputs"] == same
    for mode in written["modes"].values():
        tokens = sum(mode["tokens_per_rank"])
        assert tokens == 6 * 8 + mode["generated_tokens"] - 6
        assert np.sum(mode["expert_load"], axis=1).tolist() == [2 * tokens] * LAYERS
        assert np.sum(mode["rank_load"], axis=1).tolist() == [2 * tokens] * LAYERS
        assert np.array_equal(mode["bytes_combine"], np.transpose(mode["bytes_dispatch"]))
        assert 2 * mode["expert_bytes_resident"][0] == mode["expert_bytes_total"]
        assert len(mode["rounds"]) == 2
    before, after = written["modes"]["contiguous"], written["modes"]["semantic"]
    assert before["expert_load"] == after["expert_load"]
    assert before["requests_per_rank"] == after["requests_per_rank"] == [3, 3]

    tracked = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    numbers = {name: value for row in tracked for name, value in row.items() if "/" in name}
    for name, mode in written["modes"].items():
        sent = np.array(mode["bytes_dispatch"])
        assert numbers[f"a2a/{name}/bytes_dispatch"] == sent.sum() - np.trace(sent) > 0
        assert numbers[f"routing/{name}/lar/layer_00"] == mode["lar"][0]
        assert numbers[f"serving/{name}/seconds/experts"] == mode["seconds"]["experts"]

    # What was served is the end of the lineage: a plan, and a checkpoint.
    metrics = (tmp_path / METRICS_FILE).read_text().splitlines()
    used = {row["artifact_kind"]: row for row in map(json.loads, metrics) if "role" in row}
    assert {(kind, row["role"]) for kind, row in used.items()} == {
        ("checkpoint", "input"),
        ("plan", "input"),
    }
    assert used["plan"]["sha256"] == Plan.read(run_dir / "plan").sha256
    assert json.loads(metrics[0])["config"]["semantic_ep"]["tracking"]["wandb"] == "disabled"

    rows = [json.loads(line) for line in responses.read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(6))
    assert all(1 <= len(row["tokens"]) <= 4 for row in rows)


@pytest.mark.parametrize("attention", ["dp", "tp"])
def test_a_plan_for_generated_tokens_is_served_beside_that_for_prompts(
    run_dir, tmp_path, attention
):
    both = ("--decode-plan", str(run_dir / "decode-plan"))
    if attention == "tp":
        both = (*both, "--semantic-ep-serve-attention", "tp")
        both = (*both, "--semantic-ep-schedule-predictor", "table")
    assert run_ranks(_main, RANKS, arguments(run_dir, tmp_path, *both)) == [0, 0]
    modes = json.loads((tmp_path / "serve.json").read_text())["modes"]
    # The plans have every expert on different ranks: each holds all.
    assert modes["semantic"]["expert_bytes_resident"][0] == modes["semantic"]["expert_bytes_total"]
    assert np.mean(modes["semantic"]["lar"]) == 1.0


def test_with_attention_tp_tokens_are_dealt_evenly_and_outputs_stay_the_same(run_dir, tmp_path):
    argv = arguments(run_dir, tmp_path, "--semantic-ep-serve-attention", "tp")
    assert run_ranks(_main, RANKS, argv) == [0, 0]
    written = json.loads((tmp_path / "serve.json").read_text())
    same = {"between_modes": True, "to_single_process": True, "checked_requests": 6}
    assert written["identical_outputs"] == same
    for mode in written["modes"].values():
        tokens = sum(mode["tokens_per_rank"])
        assert tokens == 6 * 8 + mode["generated_tokens"] - 6
        # Prompts and decoding steps here are of even length.
        assert mode["tokens_per_rank"][0] == mode["tokens_per_rank"][1]
        assert mode["bytes_shuffle"] == 2 * LAYERS * tokens * 32 * 4
    before, after = written["modes"]["contiguous"], written["modes"]["semantic"]
    assert before["expert_load"] == after["expert_load"]
    assert np.mean(after["lar"]) > np.mean(before["lar"])


MISTAKES = [
    (["--plan", "/nowhere"], "no artefact here"),
    (["--prompts", "/nowhere"], "cannot read the prompts"),
    (["--semantic-ep-groups-ep-size", "4"], "ep_size is 4 and 1 ranks were started"),
    (["--semantic-ep-schedule-mode", "tokens"], "single tokens cannot be scheduled"),
    (["--semantic-ep-schedule-predictor", "table"], "single tokens cannot be scheduled"),
    (
        ["--semantic-ep-serve-attention", "tp", "--semantic-ep-schedule-mode", "requests"],
        "all ranks serve every request",
    ),
    ([], "plan is for 2 ranks and the EP group has 1"),
]


def _mistakes(rank, ranks, argv):
    launch = _launch_script()
    for change, message in MISTAKES:
        with pytest.raises(SemanticEPError, match=message):
            launch.run(launch.parse_arguments([*argv, *change]))
    at = argv.index("--plan")
    alone = [*argv[:at], "--decode-plan", *argv[at + 1 :]]
    with pytest.raises(
        SemanticEPError, match=r"--decode-plan: .* needs another.*Give that as --plan"
    ):
        launch.run(launch.parse_arguments(alone))


def test_a_mistake_is_refused_with_the_reason_and_nothing_is_written(run_dir, tmp_path):
    run_ranks(_mistakes, 1, arguments(run_dir, tmp_path))
    assert not (tmp_path / "serve.json").exists()


def test_when_a_rank_is_killed_the_other_stops_with_a_clear_error(run_dir, tmp_path):
    port = free_port()
    more = ("--rounds", "1000000", "--compare", "contiguous", "--num-requests", "5")
    argv = [sys.executable, SCRIPT, *arguments(run_dir, tmp_path, *more)]
    ranks = [
        subprocess.Popen(
            argv,
            env=rank_environment(rank, 2, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    guard = threading.Timer(200, lambda: [process.kill() for process in ranks])
    guard.start()
    try:
        assert any(line.startswith("Serving") for line in ranks[0].stdout)
        os.kill(ranks[1].pid, signal.SIGKILL)
        start = time.monotonic()
        _, errors = ranks[0].communicate(timeout=60)
        assert time.monotonic() - start < 60
        assert ranks[0].returncode == 2, errors
        assert "error: " in errors
        assert "another rank of the group died or stopped answering" in errors
        assert not (tmp_path / "serve.json").exists()
    finally:
        guard.cancel()
        for process in ranks:
            process.kill()
            process.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank, ranks, port):
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
