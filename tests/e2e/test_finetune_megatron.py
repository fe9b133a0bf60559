"""The Megatron entry from its command line: loss, checkpoint, profile, resuming under a plan."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.plan import Plan
from semantic_ep.plan.schedule import Schedule

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("megatron.core", reason="megatron-core is not installed")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the seams for CPU are inactive here"),
]

ROOT = Path(__file__).parents[2]
STEPS, LENGTH, EXPERTS, LAYERS = 12, 32, 8, 2
ARGUMENTS = f"""
    @configs/megatron/cpu_2rank.args
    --num-layers {LAYERS} --hidden-size 64 --num-attention-heads 4 --kv-channels 16
    --moe-ffn-hidden-size 48 --num-experts {EXPERTS} --seq-length {LENGTH} --lr-warmup-iters 2
    --train-iters {STEPS} --log-interval 4 --save-interval 6 --eval-interval 6 --eval-iters 1
    --use-distributed-optimizer
""".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus of two kinds of documents, in the files that launch/corpus.py writes."""
    from tokenizers import Tokenizer, models

    directory = tmp_path_factory.mktemp("corpus")
    words = {"<|endoftext|>": 0, "<|pad|>": 1} | {f"w{i}": i for i in range(2, 64)}
    Tokenizer(models.WordLevel(words, unk_token="<|pad|>")).save(str(directory / "tokenizer.json"))
    draw = np.random.default_rng(0)
    documents = [draw.integers(2 + 31 * (i % 2), 33 + 31 * (i % 2), 45) for i in range(80)]
    np.save(directory / "train.npy", np.concatenate(documents).astype(np.uint16))
    with (directory / "documents.jsonl").open("w") as stream:
        for i in range(len(documents)):
            stream.write(json.dumps({"id": str(i), "first": 45 * i, "tokens": 45}) + "\n")
    (directory / "corpus.json").write_text("{}")
    return directory


def finetune(corpus, output, *arguments, script="launch/finetune_megatron.py"):
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(script), *ARGUMENTS),
            *("--data-path", str(corpus), "--output", str(output), *arguments),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def rows(output):
    return [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()]


def test_a_run_resumed_under_a_plan_goes_on_as_if_nothing_had_moved(corpus, tmp_path):
    whole = tmp_path / "whole"
    observe = "--semantic-ep-observe-output"
    done = finetune(corpus, whole, observe, str(whole / "profile"))
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [row["loss"] for row in rows(whole)]
    assert [row["step"] for row in rows(whole)] == [4, 8, 12]
    assert losses[-1] < losses[0]
    profile = RoutingProfile.read(whole / "profile")
    assert (profile.load.sum(axis=1) == 2 * profile.tokens).all()
    assert profile.token_count[:2].sum() == 0  # Neither padding nor absent ends of text.

    shuffled = np.stack([np.random.default_rng(n).permutation(EXPERTS) for n in range(LAYERS)])
    # Each rank also has a copy of the other's first expert.
    by_rank = shuffled.reshape(LAYERS, 2, -1)
    copied = np.concatenate([by_rank, by_rank[:, ::-1, :1]], axis=2).reshape(LAYERS, -1)
    replanning = ("--semantic-ep-replan-interval", "5")
    replanning += ("--semantic-ep-replan-horizon-tokens", str(10**9))
    (whole / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("6")
    for table, *arguments in (
        (shuffled, "--semantic-ep-groups-scope", "node"),
        (copied, "--semantic-ep-dispatch-backend", "torch", *replanning),
    ):
        placement = Placement(physical_to_logical_map=table, num_experts=EXPERTS, ep_size=2)
        moved = tmp_path / str(placement.slots_per_rank)
        Plan(
            placement=placement,
            schedule=Schedule.from_profile(profile, placement),
            verdict={},
            fingerprint=profile.fingerprint,
        ).save(moved / "plan")
        done = finetune(
            *(corpus, moved, observe, str(moved / "profile"), "--load", str(whole / "checkpoint")),
            *("--semantic-ep-plan-artifact", str(moved / "plan")),
            *arguments,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert rows(moved)[-1]["loss"] == pytest.approx(losses[-1], abs=1e-4)
        again = RoutingProfile.read(moved / "profile")
        np.testing.assert_array_equal(again.load, profile.load)
        np.testing.assert_array_equal(again.coactivation, profile.coactivation)
        assert again.tokens == profile.tokens
    # The run with copies re-plans, and judges copies for its routing.
    decision = json.loads((moved / "profile-replanning.jsonl").read_text().splitlines()[0])
    assert decision["step"] == 10
    assert len(decision["remote_copies"]) == 2


def test_a_trained_model_is_one_of_transformers_and_is_trained_on_from_there(
    corpus, tmp_path, monkeypatch
):
    from transformers import AutoModelForCausalLM

    from semantic_ep.cli import main

    monkeypatch.syspath_prepend(ROOT / "launch")
    from chunks import Chunks

    first, model, megatron = tmp_path / "first", tmp_path / "model", tmp_path / "megatron"
    done = finetune(corpus, first)
    assert done.returncode == 0, done.stderr[-3000:]
    words = ["convert", "--from", "megatron", "--to", "hf", "--out", str(model)]
    assert main([*words, "--checkpoint", str(first / "checkpoint")]) == 0
    words = ["convert", "--from", "hf", "--to", "megatron", "--out", str(megatron)]
    assert main([*words, "--model", str(model)]) == 0
    done = finetune(
        *(corpus, tmp_path / "second", f"@{megatron}/model.args", "--load", str(megatron)),
        *("--finetune", "--train-iters", "1", "--lr-warmup-iters", "0", "--log-interval", "1"),
    )
    assert done.returncode == 0, done.stderr[-3000:]

    chunks = Chunks(corpus, length=LENGTH, pad=1, seed=0)
    token_id, mask = (torch.cat(parts) for parts in zip(chunks.batch(0, 4), chunks.batch(1, 4)))
    labels = token_id.where(mask.bool(), -100)
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(model)(token_id, labels=labels).loss
    assert rows(tmp_path / "second")[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)


# The training script. In the last step rank 1 leaves half of its part of the checkpoint, and rank 0
# is killed while it writes the profile.
KILLED = """
import multiprocessing, os, signal, sys
from pathlib import Path
sys.path.insert(0, "launch")
import finetune_megatron
from megatron.core import dist_checkpointing

save, write, replace = finetune_megatron.save, dist_checkpointing.save, os.replace

def die(*_):
    # Not even the processes that Megatron started for the checkpoint stay.
    for child in multiprocessing.active_children():
        child.kill()
    os.kill(os.getpid(), signal.SIGKILL)

def write_half(state, directory):
    write(state, directory)
    own = sorted(Path(directory).glob("__1_*.distcp"))[0]
    os.truncate(own, own.stat().st_size // 2)

def die_at_the_manifest(source, target):
    if Path(target).name == "manifest.json":
        die()
    replace(source, target)

def save_or_die(training, args):
    if training.step == args.train_iters:
        if os.environ["RANK"] == "1":
            dist_checkpointing.save = write_half
        else:
            os.replace = die_at_the_manifest
    save(training, args)

finetune_megatron.save = save_or_die
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, die)  # The launcher stops the rank that is left.
    sys.exit(finetune_megatron.main())
"""


def test_a_rank_killed_while_saving_leaves_the_checkpoint_and_profile_before(corpus, tmp_path):
    output, script = tmp_path / "run", tmp_path / "killed.py"
    script.write_text(KILLED)
    observe = ("--semantic-ep-observe-output", str(output / "profile"))
    done = finetune(corpus, output, *observe, script=script)
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    checkpoint = output / "checkpoint"
    assert list((checkpoint / f"iter_{STEPS:07d}").glob("__1_*.distcp"))
    assert (checkpoint / "latest_checkpointed_iteration.txt").read_text() == "6"
    before = RoutingProfile.read(output / "profile")
    saved = RoutingProfile.read(checkpoint / "iter_0000006" / "routing_profile")
    np.testing.assert_array_equal(before.load, saved.load)
    assert before.meta["steps"] == 6

    done = finetune(corpus, output, *observe, "--load", str(checkpoint))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in rows(output)][-2:] == [8, 12]
    profile = RoutingProfile.read(output / "profile")
    assert (profile.load.sum(axis=1) == 2 * profile.tokens).all()
    assert profile.tokens > before.tokens
    assert (checkpoint / "latest_checkpointed_iteration.txt").read_text() == str(STEPS)
