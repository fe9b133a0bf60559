"""Universal checkpoints of placed runs: any plan, any number of ranks, and no plan at all."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")

import torch

from semantic_ep.cli import main
from semantic_ep.errors import CheckpointError, ConfigError
from semantic_ep.integrations.deepspeed.universal import convert_to_universal
from tests.distributed.launcher import run_ranks
from tests.distributed.test_deepspeed_native_placed import FINGERPRINT as NATIVE
from tests.distributed.test_deepspeed_native_placed import NativeModel
from tests.distributed.test_deepspeed_placed import (
    CONTIGUOUS,
    EXPERTS,
    FOUR_RANKS,
    MIXED,
    PLAIN_DESCENT,
    UNEVEN,
    data_of,
    placed_config,
    placed_engine,
    resumed_losses,
    save_plan,
    train,
)
from tests.distributed.test_deepspeed_training import start

pytestmark = pytest.mark.distributed


def _train_save_go_on(rank, ranks, plan, stage, output, profile):
    engine = placed_engine(plan, stage, profile)
    losses = train(engine, data_of(rank, 5))
    engine.save_checkpoint(str(output), client_state={"seen": 5})
    return losses + train(engine, data_of(rank, 10)[5:])


def _resume(rank, ranks, cases, checkpoint):
    """Losses of each case (plan, ZeRO stage) after the universal checkpoint."""
    return [_resumed(rank, plan, stage, checkpoint) for plan, stage in cases]


def _resumed(rank, plan, stage, checkpoint):
    engine = placed_engine(plan, stage, checkpoint={"load_universal": True})
    return resumed_losses(engine, rank, checkpoint)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_universal_checkpoint_resumes_under_any_plan_and_stage_without_one_and_on_more_ranks(
    tmp_path, capsys, stage
):
    mixed, uneven, contiguous, four = (
        save_plan(tmp_path / f"plan{i}", ranks)
        for i, ranks in enumerate((MIXED, UNEVEN, CONTIGUOUS, FOUR_RANKS))
    )
    saved = tmp_path / "saved"
    losses = run_ranks(_train_save_go_on, 2, uneven, stage, saved, tmp_path / "profile")[0]
    expected = losses[5:]
    tag = (saved / "latest").read_text()
    universal = tmp_path / "universal" / "step5"
    arguments = ["convert", "--from", "deepspeed", "--to", "universal", "--json"]
    assert main([*arguments, "--checkpoint", str(saved / tag), "-o", str(universal)]) == 0
    assert json.loads(capsys.readouterr().out)["expert_parameters"] == 4
    assert (universal / "routing_profile").is_dir()
    whole = torch.load(
        universal / "zero" / "model.layers.2.mlp.experts.down_proj" / "exp_avg.pt",
        weights_only=False,
    )
    assert whole["param"].shape[0] == whole["ep_num_experts"] == EXPERTS
    # No expert was lost or left empty.
    assert whole["param"].abs().amax(dim=(1, 2)).min() > 0

    # Without a plan in processes of its own: DeepSpeed never forgets a group of experts.
    for cases in ([(uneven, 2), (mixed, 1), (mixed, 3)], [(None, 1)], [(None, 3)]):
        for resumed in run_ranks(_resume, 2, cases, universal.parent)[0]:
            assert resumed == pytest.approx(expected, abs=1e-5)
    # Twice the ranks see the same data twice, in one group of four or in two of two.
    for resumed in run_ranks(_resume, 4, [(four, stage), (contiguous, 1)], universal.parent)[0]:
        assert resumed == pytest.approx(expected, abs=1e-5)


def _save_what_cannot_be_converted(rank, ranks, plan, output):
    for name, stage, changes in (("plain", 0, {}), ("sgd", 1, PLAIN_DESCENT)):
        engine = placed_engine(plan, stage, **changes)
        train(engine, data_of(rank, 1))
        engine.save_checkpoint(str(output), name)
    universal = {"checkpoint": {"load_universal": True}}
    with pytest.raises(ConfigError, match="into the optimizer of ZeRO"):
        placed_engine(plan, 0, **universal)
    with pytest.raises(CheckpointError, match="this is no universal checkpoint"):
        placed_engine(plan, 1, **universal).load_checkpoint(str(output), "sgd")


def test_what_has_no_universal_form_is_refused_with_the_reason(tmp_path):
    run_ranks(_save_what_cannot_be_converted, 2, save_plan(tmp_path / "plan", MIXED), tmp_path)
    for name, reason in (
        ("plain", "got a checkpoint of ZeRO 0"),
        ("sgd", "the state of Adam only"),
        ("absent", "does not say where its experts are"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            convert_to_universal(tmp_path / name, tmp_path / "universal" / name)
    assert not (tmp_path / "universal").exists()


def _train_native(rank, ranks, plan, output):
    """A step of native layers without a plan, and one under it."""
    for name, under in (("without", None), ("placed", plan)):
        model = NativeModel(rank, drop_tokens=False)
        engine = start(model, placed_config(under, 1))
        engine.backward(engine(data_of(rank, 1)[0][0]))
        engine.step()
        engine.save_checkpoint(str(output), name)
    with pytest.raises(ConfigError, match=r"deepspeed\.moe layers have no universal form"):
        start(
            NativeModel(rank, drop_tokens=False),
            placed_config(plan, 1, checkpoint={"load_universal": True}),
        )


def test_native_layers_are_refused_since_deepspeed_itself_cannot_convert_their_experts(tmp_path):
    from deepspeed.checkpoint import ds_to_universal

    plan = save_plan(tmp_path / "plan", MIXED, fingerprint=NATIVE)
    run_ranks(_train_native, 2, plan, tmp_path)
    with pytest.raises(CheckpointError, match=r"deepspeed\.moe layers have no universal form"):
        convert_to_universal(tmp_path / "placed", tmp_path / "universal")
    arguments = Namespace(
        input_folder=str(tmp_path / "without"),
        output_folder=str(tmp_path / "theirs"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    # The experts of two ranks, taken for two halves of one: a weight or a bias, in no order.
    halves = r"shape '\[16(?:, 16)?\]' is invalid for input of size (?:32|512)"
    # Before 0.19.5 it takes the files of experts for those of pipeline stages.
    stages = r"Cannot find layer_01\* files"
    with pytest.raises((RuntimeError, AssertionError), match=f"{halves}|{stages}"):
        ds_to_universal.main(arguments)
