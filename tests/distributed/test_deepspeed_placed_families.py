"""Placed experts compute and learn what the whole model of their family does."""

from __future__ import annotations

import copy

import numpy as np
import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")

import torch
from torch import distributed as dist

from semantic_ep.config import SemanticEPConfig
from semantic_ep.plan.placement import Placement
from tests.distributed.launcher import run_ranks
from tests.unit.apply.test_families import _BASE, CONFIGS

pytestmark = pytest.mark.distributed


def random_model(model_type):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**_BASE, **CONFIGS[model_type]})
    model = AutoModelForCausalLM.from_config(config)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("bias", "e_score_correction_bias")):
            torch.nn.init.normal_(tensor.data, std=0.3)
    return model


def assert_same_gradient(found, expected):
    """Up to float32's rounding of the sums that it is made of."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def _compare(rank, ranks, model_types):
    from semantic_ep.integrations.deepspeed.placing import place_experts
    from semantic_ep.integrations.transformers import moe_shape

    for model_type in model_types:
        whole = random_model(model_type)
        model, shape = copy.deepcopy(whole), moe_shape(whole)
        rank_of_expert = np.random.default_rng(3).integers(
            ranks, size=(len(shape.layer_ids), shape.num_experts)
        )
        placed = place_experts(
            model,
            Placement.from_rank_of_expert(rank_of_expert, ep_size=ranks),
            SemanticEPConfig(enabled=True),
            device=torch.device("cpu"),
        )
        torch.manual_seed(rank)
        token_id = torch.randint(1, whole.config.vocab_size, (2, 12))
        outputs = [m(input_ids=token_id, labels=token_id) for m in (whole, model)]
        torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-5, atol=1e-5)
        for output in outputs:
            output.loss.backward()
        wanted = {name: parameter.grad for name, parameter in whole.named_parameters()}
        for name, layer, parameter in placed.parameters(model):
            # An expert learns from the tokens of all ranks.
            total_E = wanted.pop(name.replace(".local.", "."))
            dist.all_reduce(total_E)
            for slot, expert in enumerate(placed.held_S(layer).tolist()):
                expected = total_E[expert] if expert >= 0 else torch.zeros_like(total_E[0])
                assert_same_gradient(parameter.grad[slot], expected)
        found = dict(model.named_parameters())
        for name, grad in wanted.items():
            assert_same_gradient(found[name].grad, grad)
    return len(model_types)


def test_outputs_and_gradients_of_every_family_equal_those_of_the_whole_model():
    assert run_ranks(_compare, 2, sorted(CONFIGS)) == [len(CONFIGS)] * 2
