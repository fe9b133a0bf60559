"""ZeRO 3 under a plan, as DeepSpeed has it for AutoEP: parameters of experts are in pieces too."""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")

import torch

from semantic_ep.errors import CheckpointError, ConfigError
from tests.distributed.launcher import run_ranks
from tests.distributed.test_deepspeed_native_placed import FINGERPRINT as NATIVE
from tests.distributed.test_deepspeed_native_placed import NativeModel
from tests.distributed.test_deepspeed_placed import (
    FOUR_RANKS,
    MIXED,
    UNEVEN,
    damage,
    data_of,
    placed_config,
    placed_engine,
    save_plan,
    train,
)
from tests.distributed.test_deepspeed_training import start, tiny_model

pytestmark = pytest.mark.distributed

# Tiny parameters would all be kept whole.
IN_PIECES = {"stage": 3, "stage3_param_persistence_threshold": 0}
SHORT = 4
# One expert alone on a rank.
ALONE = [[0, 0, 0, 0, 0, 0, 0, 1], UNEVEN[1]]


def _data(rank):
    """Batches, in the end of the same two tokens on all ranks, which need few experts."""
    short = [(token_id[:1, :2], mask[:1, :2]) for token_id, mask in data_of(0, SHORT)]
    return data_of(rank, 5) + short


def _engine(plan, zero=IN_PIECES):
    return start(tiny_model(), placed_config(plan) | {"zero_optimization": zero})


def _train_save_go_on(rank, ranks, plan, output):
    from semantic_ep.integrations.deepspeed import save_huggingface_checkpoint

    data = _data(rank)
    whole = placed_engine(None)
    alone = train(whole, data)
    engine = _engine(plan)
    held = [p for _, _, p in engine.placed_experts.parameters(engine.module)]
    pieces = [p.ds_tensor.numel() * p.ds_process_group.size() == p.ds_numel for p in held]
    sizes = {p.ds_process_group.size() for p in held}
    losses = train(engine, data[:4])
    engine.save_checkpoint(str(output / "checkpoint"), client_state={"seen": 4})
    losses += train(engine, data[4:5])
    idle = 0
    for batch in data[5:]:
        engine.placed_experts.dispatcher.stats.reset()
        losses += train(engine, [batch])
        rows_LS = engine.placed_experts.dispatcher.stats.slot_activations
        idle += (rows_LS.sum(axis=1) == 0).sum()
    save_huggingface_checkpoint(engine, output / "model")
    weights = {name: tensor.clone() for name, tensor in whole.module.state_dict().items()}
    return alone, losses, (all(pieces), sizes), int(idle), weights if rank == 0 else None


def _resume(rank, ranks, plan, checkpoint):
    engine = _engine(plan)
    path, client_state = engine.load_checkpoint(str(checkpoint))
    assert path is not None
    assert client_state["seen"] == engine.global_steps == 4
    losses = train(engine, _data(rank)[4:])
    with pytest.raises(CheckpointError, match="ZeRO 3 has its weights in pieces"):
        _engine(plan, {"stage": 2}).load_checkpoint(str(checkpoint))
    return losses


def test_a_plan_trains_resumes_and_exports_at_zero_3_as_a_model_that_is_not_spread(tmp_path):
    from transformers import AutoModelForCausalLM

    plan = save_plan(tmp_path / "plan", ALONE)
    results = run_ranks(_train_save_go_on, 4, plan, tmp_path)
    alone, losses, in_pieces, _, weights = results[0]
    # Ranks without a token gather and reduce with the others.
    assert sum(idle for *_, idle, _ in results) > 0
    # Experts are divided between the two ranks that hold the same ones, and by no others.
    assert in_pieces == (True, {2})
    assert losses == pytest.approx(alone, abs=1e-4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-4, atol=1e-4)
    resumed = run_ranks(_resume, 4, plan, tmp_path / "checkpoint")[0]
    assert resumed == losses[4:]


def _save_and_go_on(rank, ranks, plan, output, zero, changes):
    engine = start(tiny_model(), placed_config(plan, **changes) | {"zero_optimization": zero})
    data = data_of(rank % 2, 10)
    losses = train(engine, data[:5])
    engine.save_checkpoint(str(output), client_state={"seen": 5})
    return losses + train(engine, data[5:])


def _resume_elsewhere(rank, ranks, plan, checkpoint, zero, changes):
    """Losses after a checkpoint of five steps, and weights without its optimizer state."""

    def fresh():
        engine = start(tiny_model(), placed_config(plan, **changes) | {"zero_optimization": zero})
        damage(engine)
        return engine

    engine = fresh()
    path, client_state = engine.load_checkpoint(str(checkpoint))
    assert path is not None
    assert client_state["seen"] == engine.global_steps == 5
    data = data_of(rank % 2, 10)[5:]
    losses = train(engine, data)
    bare = fresh()
    bare.load_checkpoint(str(checkpoint), load_optimizer_states=False)
    return losses, train(bare, data[:1])


@pytest.mark.parametrize(
    ("zero", "changes"),
    [
        (IN_PIECES, {}),
        # Some parameters are kept whole, and groups of parameters are divided.
        ({"stage": 3, "stage3_param_persistence_threshold": 600, "sub_group_size": 2000}, {}),
        (IN_PIECES, {"bf16": {"enabled": True}}),
    ],
)
def test_a_checkpoint_of_zero_3_resumes_under_another_plan_ep_size_and_number_of_ranks(
    tmp_path, zero, changes
):
    plans = {
        name: save_plan(tmp_path / name, ranks)
        for name, ranks in (("uneven", UNEVEN), ("mixed", MIXED), ("four", FOUR_RANKS))
    }
    saved = tmp_path / "two"
    near = 2e-3 if changes else 1e-5
    expected = run_ranks(_save_and_go_on, 2, plans["uneven"], saved, zero, changes)[0][5:]
    for ranks, name in ((2, "mixed"), (4, "four"), (4, "mixed")):
        # Twice the ranks see the same data twice, in one group of four or in two of two.
        results = run_ranks(_resume_elsewhere, ranks, plans[name], saved, zero, changes)
        losses, without_state = results[0]
        assert losses == pytest.approx(expected, abs=near)
        assert without_state == pytest.approx(expected[:1], abs=near)
    # And from two groups of two, whose experts were in pieces, to one.
    run_ranks(_save_and_go_on, 4, plans["mixed"], tmp_path / "four ranks", zero, changes)
    back = run_ranks(_resume_elsewhere, 2, plans["uneven"], tmp_path / "four ranks", zero, changes)
    assert back[0][0] == pytest.approx(expected, abs=near)


def _refusals(rank, ranks, plan, native):
    section = {"replan": {"interval": 5}, "observe": {"output": "profile"}}
    with pytest.raises(ConfigError, match="lie outside of memory or come and go"):
        start(
            tiny_model(),
            placed_config(plan, 3, section=section)
            | {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
        )
    # DeepSpeed itself, without a plan, and with one.
    with pytest.raises(AssertionError, match="not supported with ZeRO Stage 3"):
        start(NativeModel(rank, drop_tokens=False), placed_config(None, 3))
    with pytest.raises(ConfigError, match="DeepSpeed refuses its own MoE layers at ZeRO 3"):
        start(NativeModel(rank, drop_tokens=False), placed_config(native, 3))


def test_what_zero_3_does_not_do_is_refused_with_the_reason(tmp_path):
    native = save_plan(tmp_path / "native", MIXED, fingerprint=NATIVE)
    run_ranks(_refusals, 2, save_plan(tmp_path / "plan", MIXED), native)
