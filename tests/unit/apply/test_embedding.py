from __future__ import annotations

import numpy as np
import pytest

from semantic_ep.apply.checkpoint.embedding import token_embedding
from semantic_ep.apply.checkpoint.reader import Checkpoint
from semantic_ep.cli import main
from semantic_ep.errors import CheckpointError
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.plan import Plan


def test_a_second_embedding_is_refused_by_name(tmp_path, write_checkpoint):
    extra = {"vision.embed_tokens.weight": ("BF16", (11, 2))}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "m", extra=extra))
    with pytest.raises(CheckpointError, match=r"vision\.embed_tokens\.weight"):
        token_embedding(checkpoint)


def test_the_command_schedules_every_id_of_the_checkpoint(tmp_path, write_checkpoint, capsys):
    model = write_checkpoint(tmp_path / "model")
    checkpoint = Checkpoint.open(model)
    assert token_embedding(checkpoint).shape[0] == 11
    fingerprint = checkpoint.fingerprint()
    rng = np.random.default_rng(0)
    shape = (600, fingerprint.num_layers, fingerprint.num_experts)
    trace = RoutingTrace(
        fingerprint=fingerprint,
        experts=rng.random(shape).argsort(axis=2)[..., : fingerprint.top_k].astype(np.uint8),
        offsets=np.arange(0, 601, 20),
        token_id=rng.integers(0, 8, 600).astype(np.int32),
    )
    RoutingProfile.from_trace(trace).save(tmp_path / "profile")
    trace.save(tmp_path / "holdout")
    flags = ["--profile", str(tmp_path / "profile"), "--ep-size", "2", "--policy", "contiguous"]
    for name, more in (("plain", []), ("filled", ["--embeddings", str(model)])):
        assert main(["plan", *flags, *more, "-o", str(tmp_path / name)]) in (0, 1)
    capsys.readouterr()
    assert Plan.read(tmp_path / "plain").schedule.vocab_size == 8
    filled = Plan.read(tmp_path / "filled").schedule
    assert filled.vocab_size == 11
    assert (filled.token_to_rank >= 0).all()
