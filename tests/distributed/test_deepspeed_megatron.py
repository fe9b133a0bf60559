"""A DeepSpeed engine trains a placed Megatron-core model as Megatron's own optimizer does."""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("megatron.core")

from semantic_ep.errors import CheckpointError, ConfigError, PlacementError
from tests.distributed import megatron_tiny as tiny
from tests.distributed.launcher import run_ranks
from tests.distributed.test_megatron import ROWS
from tests.distributed.test_megatron_copies import ON_TWO, with_copies

pytestmark = pytest.mark.distributed

STEPS = 20
# By name: Megatron's settings, DeepSpeed's, and ZeRO stages. Plain descent shows gradients of a
# wrong scale, which Adam hides. DeepSpeed takes torch's AdamW, which decays weights unless told not
# to.
OPTIMIZERS = {
    "sgd": (
        {"optimizer": "sgd", "lr": 0.1, "sgd_momentum": 0.5},
        {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.5}},
        (0, 2),
    ),
    "adam": (
        {"optimizer": "adam", "lr": 3e-3, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-8},
        {
            "type": "Adam",
            "params": {
                "lr": 3e-3,
                "betas": (0.9, 0.95),
                "eps": 1e-8,
                "weight_decay": 0.0,
                "torch_adam": True,
            },
        },
        (1,),
    ),
}


def _by_megatron(rank, chosen):
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
    settings = OptimizerConfig(**chosen, weight_decay=0.0, clip_grad=0.0)
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


def _by_deepspeed(rank, chosen, stage, directory):
    import deepspeed

    from semantic_ep.integrations.deepspeed.megatron import adopt_experts

    model = tiny.model(tiny.config(), ROWS)
    adopt_experts(model)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": tiny.BATCH,
            "optimizer": chosen,
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
    results = []
    for by_megatron, by_deepspeed, stages in OPTIMIZERS.values():
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        wanted, found = _by_megatron(rank, by_megatron), []
        for stage in stages:
            model_parallel_cuda_manual_seed(1, force_reset_rng=True)
            found.append(_by_deepspeed(rank, by_deepspeed, stage, directory))
        results.append((wanted, found))
    return results


def test_a_deepspeed_engine_has_the_losses_of_megatrons_optimizer(tmp_path):
    for results in run_ranks(_train_both, 2, tmp_path, timeout=400):
        for wanted, found in results:
            assert wanted[-1] < wanted[0] - 0.3
            for losses in found:
                assert losses == pytest.approx(wanted, abs=1e-4)


def _refused(rank, ranks):
    from semantic_ep.integrations.deepspeed.megatron import adopt_experts

    tiny.start(tensor_parallel=2, expert_parallel=1)
    with pytest.raises(ConfigError, match="--tensor-model-parallel-size"):
        adopt_experts(tiny.model(tiny.config()))


def _refused_with_copies(rank, ranks):
    from semantic_ep.integrations.deepspeed.megatron import adopt_experts

    tiny.start()
    with pytest.raises(PlacementError, match="would be trained apart"):
        adopt_experts(with_copies(tiny.config(), ON_TWO).model.module)


def test_copies_of_experts_are_refused():
    run_ranks(_refused_with_copies, 2)


def test_a_model_that_deepspeed_cannot_reduce_is_refused():
    run_ranks(_refused, 2)
