"""Megatron-core and DeepSpeed record the same profile of the same model on the same data."""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

import torch

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.observe.profile import RoutingProfile
from tests.distributed import megatron_tiny as tiny
from tests.distributed.launcher import run_ranks
from tests.distributed.test_conversion import MODELS, random_model
from tests.distributed.test_deepspeed_training import (
    VOCAB,
    assert_same_counts,
    batches,
    deepspeed_config,
    start,
)

pytestmark = pytest.mark.distributed

PAD, MICRO_BATCHES = 1, 2
# One with softmax and a dense layer; one with groups of experts and a bias that only ranks them.
FAMILIES = {"qwen2_moe": (0, 2), "deepseek_v3": (1, 2)}


def _convert(rank, ranks, directory):
    from semantic_ep.integrations.conversion import huggingface_to_megatron

    tiny.start(expert_parallel=1)
    for family in FAMILIES:
        random_model(family).save_pretrained(directory / family)
        huggingface_to_megatron(directory / family, directory / f"{family}-megatron")


def _in_megatron(rank, directory, family):
    from megatron.core import dist_checkpointing

    from semantic_ep.config.sections import ObserveConfig
    from semantic_ep.integrations.conversion.distributed_checkpoint import DistributedCheckpoint
    from semantic_ep.integrations.conversion.model import gpt_model
    from semantic_ep.integrations.megatron import ModelObservation

    checkpoint = DistributedCheckpoint(directory / f"{family}-megatron")
    model = gpt_model(
        checkpoint.arguments, expert_model_parallel_size=2, expert_tensor_parallel_size=1
    )
    state = {"model": model.sharded_state_dict()}
    model.load_state_dict(dist_checkpointing.load(state, str(checkpoint.directory))["model"])
    observation = ModelObservation(
        model.train(),
        ObserveConfig(output=str(directory / f"{family}-by-megatron")),
        fingerprint=ModelFingerprint(
            architecture="gpt",
            layer_ids=FAMILIES[family],
            num_experts=model.config.num_moe_experts,
            top_k=model.config.moe_router_topk,
        ),
        vocab_size=VOCAB,
        pad_token_id=PAD,
    )
    for number, (token_id, _) in enumerate(batches(rank, 3 * MICRO_BATCHES), start=1):
        length = token_id.shape[1]
        later = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
        position = torch.arange(length).expand_as(token_id).contiguous()
        model(token_id, position, later).square().mean().backward()
        if number % MICRO_BATCHES == 0:
            observation.step()
    observation.save()


def _in_deepspeed(rank, directory, family):
    config = deepspeed_config(
        directory / f"{family}-by-deepspeed",
        gradient_accumulation_steps=MICRO_BATCHES,
        optimizer={"type": "SGD", "params": {"lr": 0.0}},  # The model stays the same.
    )
    engine = start(random_model(family).train(), config)
    for token_id, mask in batches(rank, 3 * MICRO_BATCHES):
        output = engine(input_ids=token_id, attention_mask=mask, labels=token_id)
        engine.backward(output.loss)
        engine.step()
    engine.semantic_ep.save()


def _observe(rank, ranks, directory):
    tiny.start(expert_parallel=2)
    for family in FAMILIES:
        _in_megatron(rank, directory, family)
        _in_deepspeed(rank, directory, family)


def test_both_frameworks_record_the_same_profile(tmp_path):
    run_ranks(_convert, 1, tmp_path)
    run_ranks(_observe, 2, tmp_path)
    assert MODELS["deepseek_v3"]["n_group"] > MODELS["deepseek_v3"]["topk_group"]
    for family in FAMILIES:
        by_megatron, by_deepspeed = (
            RoutingProfile.read(tmp_path / f"{family}-by-{name}")
            for name in ("megatron", "deepspeed")
        )
        assert by_megatron.tokens > 100
        assert_same_counts(by_megatron, by_deepspeed)
