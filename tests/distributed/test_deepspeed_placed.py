"""DeepSpeed trains under a plan: losses, checkpoints and exports do not know of the placement."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")

import torch
from torch import distributed as dist

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.plan import Plan
from semantic_ep.plan.schedule import Schedule
from tests.distributed.launcher import run_ranks
from tests.distributed.test_deepspeed_training import batches, deepspeed_config, start, tiny_model

pytestmark = pytest.mark.distributed

LAYERS, EXPERTS, VOCAB = (0, 2), 8, 96


def save_plan(path, rank_of_expert):
    """A plan that puts expert e of MoE layer l on rank `rank_of_expert[l][e]`."""
    placement = Placement.from_rank_of_expert(
        np.array(rank_of_expert), ep_size=int(np.max(rank_of_expert)) + 1
    )
    plan = Plan(
        placement=placement,
        schedule=Schedule(
            token_to_rank=np.zeros((len(LAYERS), VOCAB), dtype=np.int8),
            confidence=np.zeros((len(LAYERS), VOCAB), dtype=np.uint8),
            request_affinity=np.ones((VOCAB, placement.ep_size), dtype=np.float16),
        ),
        verdict={},
        fingerprint=ModelFingerprint(
            architecture="qwen3_moe", layer_ids=LAYERS, num_experts=EXPERTS, top_k=2
        ),
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
    return lambda ranks: save_plan(tmp_path / f"plan{next(numbers)}", ranks)


def placed_engine(plan, stage=0, output=None, **changes):
    """An engine under a plan; without one, every rank holds every expert."""
    section = {"enabled": plan is not None}
    if plan is not None:
        section["plan"] = {"artifact": str(plan)}
    if output is not None:
        section["observe"] = {"output": str(output)}
    config = deepspeed_config(
        expert_parallel={"enabled": False},
        zero_optimization={"stage": stage},
        gradient_accumulation_steps=1,
        semantic_ep=section,
        **changes,
    )
    return start(tiny_model(), config)


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


def _train_under(rank, ranks, plans, stage):
    """Losses of 50 steps under each plan."""
    return [train(placed_engine(plan, stage), data_of(rank, 50)) for plan in plans]


def assert_same_losses(alone, *others):
    assert alone[-1] < alone[0] - 0.3
    for losses in others:
        assert losses == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_any_placement_has_the_losses_of_a_model_that_is_not_spread_over_50_steps(plan, stage):
    plans = [None, *map(plan, (CONTIGUOUS, MIXED, UNEVEN))]
    assert_same_losses(*run_ranks(_train_under, 2, plans, stage)[0])


def test_two_groups_of_two_ranks_have_the_losses_of_a_model_that_is_not_spread(plan):
    assert_same_losses(*run_ranks(_train_under, 4, [None, plan(MIXED)], 2)[0])


def _train_save_go_on(rank, ranks, plan, stage, output):
    engine = placed_engine(plan, stage)
    data = data_of(rank % 2, 10)
    losses = train(engine, data[:5])
    engine.save_checkpoint(str(output), client_state={"seen": 5})
    return losses + train(engine, data[5:])


def _resume(rank, ranks, plan, stage, checkpoint):
    torch.manual_seed(1)
    engine = placed_engine(plan, stage)
    for parameter in engine.module.parameters():  # Nothing may be left of these.
        parameter.data.add_(1)
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
