"""A DeepSpeed engine trains a placed Megatron-core model as Megatron's own optimizer does."""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("megatron.core")

from semantic_ep.errors import CheckpointError, ConfigError
from tests.distributed import megatron_tiny as tiny
from tests.distributed.launcher import run_ranks
from tests.distributed.test_megatron import ROWS

pytestmark = pytest.mark.distributed

STEPS = 20
# Plain descent shows gradients of a wrong scale, which Adam hides.
LR, MOMENTUM = 0.1, 0.5


def _by_megatron(rank):
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = tiny.config()
    model = DistributedDataParallel(
        config, DistributedDataParallelConfig(), tiny.model(config, ROWS)
    )
    settings = OptimizerConfig(
        optimizer="sgd", lr=LR, sgd_momentum=MOMENTUM, weight_decay=0.0, clip_grad=0.0
    )
    optimizer = get_megatron_optimizer(settings, [model])
    losses = []
    for step in range(STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss = model(**tiny.batch(step % 2, rank)).mean()
        loss.backward()
        finalize_model_grads([model])
        optimizer.step()
        losses.append(loss.item())
    return losses


def _by_deepspeed(rank, stage, directory):
    import deepspeed

    from semantic_ep.integrations.deepspeed.megatron import adopt_experts

    model = tiny.model(tiny.config(), ROWS)
    adopt_experts(model)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": tiny.BATCH,
            "optimizer": {"type": "SGD", "params": {"lr": LR, "momentum": MOMENTUM}},
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
            "steps_per_print": 10**9,
        },
    )
    losses = []
    for step in range(STEPS):
        loss = engine(**tiny.batch(step % 2, rank)).mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    with pytest.raises(CheckpointError, match="experts of rank 0 only"):
        engine.save_checkpoint(str(directory))
    return losses


def _train_both(rank, ranks, directory):
    import deepspeed
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    tiny.start()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    wanted = _by_megatron(rank)
    found = []
    for stage in (0, 2):
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        found.append(_by_deepspeed(rank, stage, directory))
    return wanted, found


def test_a_deepspeed_engine_has_the_losses_of_megatrons_optimizer(tmp_path):
    for wanted, found in run_ranks(_train_both, 2, tmp_path):
        assert wanted[-1] < wanted[0] - 0.3
        for losses in found:
            assert losses == pytest.approx(wanted, abs=1e-4)


def _refused(rank, ranks):
    from semantic_ep.integrations.deepspeed.megatron import adopt_experts

    tiny.start(tensor_parallel=2, expert_parallel=1)
    with pytest.raises(ConfigError, match="--tensor-model-parallel-size"):
        adopt_experts(tiny.model(tiny.config()))


def test_a_model_that_deepspeed_cannot_reduce_is_refused():
    run_ranks(_refused, 2)
