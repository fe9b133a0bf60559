"""The training script trains under a plan, and goes on under another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.observe.profile import RoutingProfile
from tests.distributed.test_deepspeed_placed import CONTIGUOUS, MIXED, save_plan

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
WORDS = [f"w{number}" for number in range(90)]


@pytest.fixture
def data(tmp_path):
    """A corpus of random words, in the form that launch/corpus.py writes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    data = tmp_path / "data"
    data.mkdir()
    vocabulary = {w: n for n, w in enumerate(["<|endoftext|>", "<|pad|>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(data / "tokenizer.json"))
    rng = np.random.default_rng(0)
    np.save(data / "train.npy", rng.integers(3, 93, 4000).astype(np.uint16))
    documents = [{"id": f"d{n}", "kind": "k", "first": 100 * n, "tokens": 100} for n in range(40)]
    held_out = [{"id": f"h{n}", "kind": "k", "text": " ".join(WORDS[:20])} for n in range(4)]
    for name, rows in (("documents", documents), ("holdout", held_out)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{name}.jsonl").write_text(text)
    (data / "corpus.json").write_text("{}")
    return data


def run(data, output, plan, *more):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
        "steps_per_print": 10**9,
        "semantic_ep": {"enabled": True, "tracking": {"wandb": "disabled"}},
    }
    file = data / "ds.json"
    file.write_text(json.dumps(config))
    shape = {"num-layers": 2, "hidden-size": 32, "num-experts": 8, "moe-intermediate-size": 16}
    arguments = {
        "--deepspeed_config": file,
        "--data": data,
        "--output": output,
        "--semantic-ep-plan-artifact": plan,
        "--sequence-length": 32,
        "--log-interval": 1,
        **{f"--{name}": value for name, value in shape.items()},
    }
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        + ["--standalone", str(ROOT / "launch/finetune_deepspeed.py"), "--deepspeed"]
        + [str(part) for pair in arguments.items() for part in pair]
        # The weight of the balancing loss depends on the number of steps of a run.
        + ["--balance-loss", "0", "0", *map(str, more)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()]


def test_a_run_under_a_plan_goes_on_under_another(data, tmp_path):
    fingerprint = ModelFingerprint(
        architecture="qwen3_moe", layer_ids=(0, 1), num_experts=8, top_k=2
    )
    plans = [
        save_plan(tmp_path / f"plan{n}", ranks, fingerprint=fingerprint)
        for n, ranks in enumerate((MIXED, CONTIGUOUS))
    ]
    deciding = ["--semantic-ep-replan-interval", 4]
    straight = run(data, tmp_path / "straight", plans[0], "--steps", 5, *deciding)
    first = run(data, tmp_path / "first", plans[0], "--steps", 3)
    second = run(
        data, tmp_path / "second", plans[1], "--steps", 5, "--load", tmp_path / "first/checkpoint"
    )
    assert [row["step"] for row in second] == [4, 5]
    losses = [row["loss"] for row in first + second]
    assert losses == pytest.approx([row["loss"] for row in straight], abs=1e-5)
    whole, resumed = (
        RoutingProfile.read(tmp_path / f"{r}/profile") for r in ("straight", "second")
    )
    assert resumed.tokens == whole.tokens
    assert (tmp_path / "second/model/config.json").is_file()
    reports = (tmp_path / "straight/profile-replanning.jsonl").read_text().splitlines()
    decision = json.loads(reports[0])
    assert (decision["step"], decision["applied"]) == (4, False)
