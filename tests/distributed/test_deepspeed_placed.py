"""DeepSpeed trains under a plan: losses, checkpoints and exports do not know of the placement."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")

import torch
from torch import distributed as dist

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.errors import CheckpointError, ConfigError, PeerFailureError
from semantic_ep.integrations.deepspeed import peers_must_answer
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.plan import Plan
from semantic_ep.plan.schedule import Schedule
from tests.distributed.launcher import run_ranks
from tests.distributed.test_deepspeed_training import (
    BruteForce,
    assert_same_counts,
    batches,
    deepspeed_config,
    start,
    tiny_model,
)

pytestmark = pytest.mark.distributed

LAYERS, EXPERTS, VOCAB = (0, 2), 8, 96


FINGERPRINT = ModelFingerprint(
    architecture="qwen3_moe", layer_ids=LAYERS, num_experts=EXPERTS, top_k=2
)


def save_plan(path, placement, *, fingerprint=FINGERPRINT):
    """A plan of a placement, or of the rank of each expert by MoE layer."""
    if not isinstance(placement, Placement):
        ranks = np.array(placement)
        placement = Placement.from_rank_of_expert(ranks, ep_size=int(ranks.max()) + 1)
    plan = Plan(
        placement=placement,
        schedule=Schedule(
            token_to_rank=np.zeros((placement.num_layers, VOCAB), dtype=np.int8),
            confidence=np.zeros((placement.num_layers, VOCAB), dtype=np.uint8),
            request_affinity=np.ones((VOCAB, placement.ep_size), dtype=np.float16),
        ),
        verdict={},
        fingerprint=fingerprint,
    )
    plan.save(path)
    return path


CONTIGUOUS = [[0, 0, 0, 0, 1, 1, 1, 1]] * 2
MIXED = [[1, 0, 1, 1, 0, 0, 1, 0], [0, 1, 1, 0, 1, 0, 0, 1]]
UNEVEN = [[1, 0, 1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 1, 0, 1, 0]]
FOUR_RANKS = [[3, 1, 0, 2, 0, 2, 1, 3], [2, 3, 1, 0, 3, 1, 0, 2]]


@pytest.fixture
def plan(tmp_path):
    numbers = iter(range(100))
    return lambda placement: save_plan(tmp_path / f"plan{next(numbers)}", placement)


def placed_config(plan, stage=0, output=None, section=None, **changes):
    """DeepSpeed's configuration under a plan; without one, every rank holds every expert."""
    section = {"enabled": plan is not None, **(section or {})}
    if plan is not None:
        section["plan"] = {"artifact": str(plan)}
    if output is not None:
        section["observe"] = {"output": str(output)}
    return deepspeed_config(
        expert_parallel={"enabled": False},
        zero_optimization={"stage": stage},
        gradient_accumulation_steps=1,
        semantic_ep=section,
        **changes,
    )


def placed_engine(*args, **options):
    """An engine of `placed_config`."""
    return start(tiny_model(), placed_config(*args, **options))


# Adam hides gradients of a wrong scale.
PLAIN_DESCENT = {
    "optimizer": {"type": "SGD", "params": {"lr": 0.3}},
    "zero_allow_untested_optimizer": True,
}


def train(engine, data):
    """Loss of each step, mean over all ranks."""
    losses = []
    for token_id, mask in data:
        labels = token_id.masked_fill(mask == 0, -100)
        loss = engine(input_ids=token_id, attention_mask=mask, labels=labels).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
    return losses


def data_of(rank, steps):
    """The same five batches again and again, so that there is something to learn."""
    five = list(batches(rank, 5))
    return [five[step % 5] for step in range(steps)]


def _train_under(rank, ranks, plans, stage, changes):
    """Losses of 50 steps under each plan."""
    return [train(placed_engine(plan, stage, **changes), data_of(rank, 50)) for plan in plans]


def assert_same_losses(alone, *others):
    assert alone[-1] < alone[0] - 0.3
    for losses in others:
        assert losses == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_any_placement_has_the_losses_of_a_model_that_is_not_spread_over_50_steps(plan, stage):
    plans = [None, *map(plan, (CONTIGUOUS, MIXED, UNEVEN))]
    assert_same_losses(*run_ranks(_train_under, 2, plans, stage, {})[0])


@pytest.mark.parametrize("stage", [0, 2])
def test_two_groups_of_two_ranks_have_the_losses_of_a_model_that_is_not_spread(plan, stage):
    plans = [None, plan(MIXED)]
    assert_same_losses(*run_ranks(_train_under, 4, plans, stage, PLAIN_DESCENT)[0])


def _train_eight(rank, ranks, plans):
    data = data_of(rank, 10)
    return [train(placed_engine(plan, 2, **PLAIN_DESCENT), data) for plan in plans]


def test_on_eight_ranks_two_groups_of_four_have_the_losses_of_contiguous_experts(plan):
    contiguous = np.arange(EXPERTS) // 2
    plans = [plan([contiguous] * 2), plan(FOUR_RANKS)]
    # Every rank has data of its own, and starts with seven others on as many cores as there are.
    options = {"timeout": 400, "collective_timeout": 200}
    straight, placed = run_ranks(_train_eight, 8, plans, **options)[0]
    assert straight[-1] < straight[0] - 0.02
    assert placed == pytest.approx(straight, abs=1e-4)


def _train_save_go_on(rank, ranks, plan, stage, output):
    engine = placed_engine(plan, stage)
    data = data_of(rank % 2, 10)
    losses = train(engine, data[:5])
    engine.save_checkpoint(str(output), client_state={"seen": 5})
    return losses + train(engine, data[5:])


def _resume(rank, ranks, plan, stage, checkpoint):
    torch.manual_seed(1)
    return resumed_losses(placed_engine(plan, stage), rank, checkpoint)


def damage(engine):
    """Change all weights: nothing may be left of these after a checkpoint was loaded."""
    for parameter in engine.module.parameters():
        parameter.data.add_(1)
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.data.add_(1)


def resumed_losses(engine, rank, checkpoint):
    """Losses of an engine after a checkpoint of five steps, which all its weights come from."""
    damage(engine)
    path, client_state = engine.load_checkpoint(str(checkpoint))
    assert path is not None
    assert client_state["seen"] == engine.global_steps == 5
    return train(engine, data_of(rank % 2, 10)[5:])


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_resumed_run_goes_on_under_the_same_plan_another_plan_and_another_ep_size(
    plan, stage, tmp_path
):
    mixed = plan(MIXED)
    expected = run_ranks(_train_save_go_on, 2, mixed, stage, tmp_path)[0][5:]
    assert run_ranks(_resume, 2, mixed, stage, tmp_path)[0] == expected
    moved = run_ranks(_resume, 2, plan(UNEVEN), stage, tmp_path)[0]
    assert moved == pytest.approx(expected, abs=1e-5)
    # Twice the ranks see the same data twice, in one group of four or in two of two.
    for ranks in (FOUR_RANKS, CONTIGUOUS):
        wider = run_ranks(_resume, 4, plan(ranks), stage, tmp_path)[0]
        assert wider == pytest.approx(expected, abs=1e-5)


def _observe_and_export(rank, ranks, plan, output):
    from semantic_ep.integrations.deepspeed import LoadBalancingLoss, save_huggingface_checkpoint

    engine = placed_engine(plan, 1, output / "profile")
    balance = LoadBalancingLoss(engine.module)
    count = BruteForce(
        [engine.module.get_submodule(f"model.layers.{layer}.mlp.gate") for layer in LAYERS],
        lambda _router, _args, output: output[2],
    )
    for token_id, mask in data_of(rank, 4):
        loss = count.forward(engine, token_id, mask, labels=token_id).loss
        engine.backward(loss + 0.1 * balance.of_last_pass(mask.reshape(-1)))
        engine.step()
    engine.save_checkpoint(str(output / "checkpoint"))
    save_huggingface_checkpoint(engine, output / "model", max_shard_bytes=20_000)
    with pytest.raises(CheckpointError, match="experts of rank 0 only"):
        engine.save_16bit_model(str(output))
    engine.eval()
    with torch.no_grad():
        logits = engine(input_ids=token_id, attention_mask=mask).logits
    sent = engine.placed_experts.dispatcher.stats.snapshot()
    return (
        (token_id, mask, logits),
        count.profile(engine.semantic_ep.fingerprint()),
        sent,
        balance.max_over_mean(),
    )


def test_a_placed_run_records_its_routing_and_exports_its_model_in_logical_order(plan, tmp_path):
    from transformers import AutoModelForCausalLM

    results = run_ranks(_observe_and_export, 2, plan(UNEVEN), tmp_path)
    assert_same_counts(RoutingProfile.read(tmp_path / "profile"), results[0][1])
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (token_id, mask, logits), _, sent, imbalance in results:
        with torch.no_grad():
            reloaded = model.eval()(input_ids=token_id, attention_mask=mask).logits
        real = mask.bool()
        torch.testing.assert_close(reloaded[real], logits[real], rtol=1e-5, atol=1e-5)
        assert sent["activations"].sum() == 5 * len(LAYERS) * token_id.numel() * 2
        assert imbalance >= 1


def _die_while_saving(rank, ranks, plan, output):
    engine = placed_engine(plan, 1)
    train(engine, data_of(rank, 5))
    engine.save_checkpoint(str(output), client_state={"seen": 5})
    expected = train(engine, data_of(rank, 10)[5:])
    if rank == 1:
        # Half of a file of its own is written when the rank is killed.
        save, files = engine.checkpoint_engine.save, []

        def killed(state, path):
            save(state, path)
            files.append(path)
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        engine.checkpoint_engine.save = killed
    with pytest.raises(PeerFailureError):  # noqa: SIM117
        with peers_must_answer():
            engine.save_checkpoint(str(output), client_state={"seen": 10})
    return expected


def test_a_rank_killed_while_saving_leaves_the_checkpoint_before_to_resume_from(plan, tmp_path):
    mixed = plan(MIXED)
    expected = run_ranks(_die_while_saving, 2, mixed, tmp_path, dying=[1])[0]
    assert (tmp_path / "global_step10").is_dir()
    assert (tmp_path / "latest").read_text() == "global_step5"
    assert run_ranks(_resume, 2, mixed, 1, tmp_path)[0] == expected


def _refusals(rank, ranks, plans, checkpoint):
    def refused(error, match, plan, stage=0, **section):
        with pytest.raises(error, match=match):
            placed_engine(plans[plan], stage, section=section)

    refused(ConfigError, "does not divide the world size 2", "four ranks")
    refused(ConfigError, "another number of ranks", "mixed", groups={"ep_size": 1})
    engine = placed_engine(plans["mixed"])
    with pytest.raises(CheckpointError, match="does not say where its experts are"):
        engine.load_checkpoint(str(checkpoint), "absent")
    engine.save_checkpoint(str(checkpoint))
    with pytest.raises(CheckpointError, match="ZeRO 0 and ZeRO 1 or 2 store it differently"):
        placed_engine(plans["uneven"], 1).load_checkpoint(str(checkpoint))


def test_what_cannot_be_trained_or_resumed_under_a_plan_is_refused_with_the_reason(plan, tmp_path):
    plans = {
        "mixed": plan(MIXED),
        "uneven": plan(UNEVEN),
        "four ranks": plan(FOUR_RANKS),
    }
    run_ranks(_refusals, 2, plans, tmp_path)
