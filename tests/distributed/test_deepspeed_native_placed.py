"""Native `deepspeed.moe` layers under a plan: same losses, and no byte more than the cost model."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("deepspeed")

import torch
from torch import distributed as dist
from torch import nn

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.errors import CheckpointError, PlacementError
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.cost import evaluate
from semantic_ep.plan.plan import Plan
from tests.distributed.launcher import run_ranks
from tests.distributed.test_deepspeed_placed import (
    CONTIGUOUS,
    MIXED,
    PLAIN_DESCENT,
    UNEVEN,
    placed_config,
    save_plan,
)
from tests.distributed.test_deepspeed_training import (
    VOCAB,
    batches,
    best_two,
    start,
)

pytestmark = pytest.mark.distributed

WIDTH, EXPERTS, LAYERS = 16, 8, 2
FINGERPRINT = ModelFingerprint(
    architecture="NativeModel", layer_ids=(0, 1), num_experts=EXPERTS, top_k=2
)


class NativeModel(nn.Module):
    """Predicts the next token with two layers whose experts all differ."""

    def __init__(self, rank, *, drop_tokens):
        from deepspeed.moe.layer import MoE

        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.layers = nn.ModuleList(
            MoE(
                WIDTH,
                nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)),
                num_experts=EXPERTS,
                ep_size=2,
                k=2,
                capacity_factor=0.5,
                drop_tokens=drop_tokens,
                top2_2nd_expert_sampling=False,
            )
            for _ in range(LAYERS)
        )
        for layer in self.layers:
            for slot, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
                torch.manual_seed(1 + (rank % 2) * layer.num_local_experts + slot)
                for parameter in expert.parameters():
                    parameter.data.normal_(std=0.2)

    def forward(self, input_ids):
        x, balance = self.embedding(input_ids), 0.0
        for layer in self.layers:
            y, l_aux, _ = layer(x)
            x, balance = x + y, balance + l_aux
        logits = self.head(x[:, :-1]).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, input_ids[:, 1:].flatten())
        return loss + 0.01 * balance


def native_engine(rank, plan, stage=0, *, drop_tokens=False):
    config = placed_config(plan, stage, **PLAIN_DESCENT)
    return start(NativeModel(rank, drop_tokens=drop_tokens), config)


def train(engine, rank, steps):
    data = list(batches(rank, 5))
    losses = []
    for step in steps:
        loss = engine(data[step % 5][0])
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
    return losses


def _losses(rank, ranks, plans, stage, drop_tokens):
    # Without a plan last: DeepSpeed then finds the groups that the plans made.
    return [
        train(native_engine(rank, plan, stage, drop_tokens=drop_tokens), rank, range(50))
        for plan in plans
    ]


@pytest.fixture
def plan(tmp_path):
    numbers = iter(range(100))
    return lambda placement: save_plan(
        tmp_path / f"plan{next(numbers)}", placement, fingerprint=FINGERPRINT
    )


@pytest.mark.parametrize(
    ("ranks", "stage", "drop_tokens"), [(2, 0, False), (2, 2, True), (4, 1, False)]
)
def test_a_plan_has_the_losses_of_deepspeeds_own_exchange(plan, ranks, stage, drop_tokens):
    plans = [plan(MIXED), plan(CONTIGUOUS), None]
    *placed, native = run_ranks(_losses, ranks, plans, stage, drop_tokens)[0]
    assert native[-1] < native[0] - 0.5
    for losses in placed:
        assert losses == pytest.approx(native, abs=1e-4)


def _count(rank, ranks, plan):
    engine = native_engine(rank, plan)
    seen = []
    for layer in engine.module.layers:
        layer.deepspeed_moe.gate.register_forward_hook(
            lambda *call: seen.append(best_two(*call).numpy())
        )
    data = next(batches(rank, 1))[0]
    engine.eval()
    with torch.no_grad():
        engine(data)
    return (
        data.flatten().numpy(),
        np.stack(seen, axis=1),
        engine.placed_experts.dispatcher.stats.snapshot(),
    )


@pytest.mark.parametrize("placement", [CONTIGUOUS, MIXED])
def test_the_bytes_that_are_sent_are_those_that_the_cost_model_predicts(plan, placement):
    artifact = plan(placement)
    results = run_ranks(_count, 2, artifact)
    token_id = np.concatenate([ids for ids, _, _ in results])
    trace = RoutingTrace(
        fingerprint=FINGERPRINT,
        experts=np.concatenate([experts for _, experts, _ in results]).astype(np.uint8),
        offsets=np.array([0, len(token_id)]),
        token_id=token_id.astype(np.int32),
    )
    home = np.repeat(np.arange(2), [len(ids) for ids, _, _ in results])
    predicted = evaluate(Plan.read(artifact).placement, trace, home).bytes_between_ranks(WIDTH * 4)
    for rank, (_, _, sent) in enumerate(results):
        counted = sent["bytes_dispatch"].sum(axis=0)
        counted[rank] = 0
        assert counted.tolist() == predicted[rank].tolist()
    assert predicted.sum() > 0


def _save(rank, ranks, plan, output):
    engine = native_engine(rank, plan, 1)
    train(engine, rank, range(5))
    engine.save_checkpoint(str(output))
    return train(engine, rank, range(5, 10))


def _resume(rank, ranks, plan, other, uneven, output):
    engine = native_engine(rank, plan, 1)
    for parameter in engine.module.parameters():
        parameter.data.add_(1)
    assert engine.load_checkpoint(str(output))[0] is not None
    losses = train(engine, rank, range(5, 10))
    with pytest.raises(CheckpointError, match="resume under their own plan only"):
        native_engine(rank, other, 1).load_checkpoint(str(output))
    with pytest.raises(PlacementError, match="as many experts on every rank"):
        native_engine(rank, uneven, 1)
    return losses


def test_native_layers_resume_under_their_plan_and_refuse_another(plan, tmp_path):
    mixed = plan(MIXED)
    expected = run_ranks(_save, 2, mixed, tmp_path / "checkpoint")[0]
    resumed = run_ranks(_resume, 2, mixed, plan(CONTIGUOUS), plan(UNEVEN), tmp_path / "checkpoint")
    assert resumed[0] == expected
