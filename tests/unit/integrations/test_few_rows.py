import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import grouped_mm_experts_forward

from semantic_ep.integrations.few_rows import (
    EXPERTS,
    experts_implementation,
    few_rows_experts_forward,
)

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 6,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
}


def experts_of(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.set_experts_implementation(experts_implementation(model, torch.device("cpu")))
    experts = model.model.layers[0].mlp.experts
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts


# The second has biases, transposed weights and a gate of its own.
@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def experts(request):
    return experts_of(request.param)


@given(st.data())
def test_few_rows_come_to_what_the_grouped_matmul_says(experts, data):
    tokens, top_k = data.draw(st.tuples(st.integers(0, 9), st.integers(1, 3)), label="T, K")
    chosen = st.lists(st.integers(0, 5), min_size=tokens * top_k, max_size=tokens * top_k)
    expert_R = torch.tensor(data.draw(chosen, label="experts"), dtype=torch.int64)
    index_TK = expert_R.view(tokens, top_k)
    x_TD, weights_TK = torch.randn(tokens, 16), torch.rand(tokens, top_k)
    with torch.inference_mode():
        expected = grouped_mm_experts_forward(experts, x_TD, index_TK, weights_TK)
        found = few_rows_experts_forward(experts, x_TD, index_TK, weights_TK)
    # Sums of a few hundred products of size 1, in another order.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_a_model_computes_few_rows_without_the_grouped_matmul(monkeypatch, experts):
    assert experts.config._experts_implementation == EXPERTS

    def refuse(*_):
        raise AssertionError("grouped")

    monkeypatch.setattr("transformers.integrations.moe.grouped_mm_experts_forward", refuse)
    routes = torch.tensor([[0, 3]]), torch.rand(1, 2)
    with torch.inference_mode():
        assert experts(torch.randn(1, 16), *routes).shape == (1, 16)
        with pytest.raises(AssertionError, match="grouped"):
            experts(torch.randn(40, 16), *(part.expand(40, -1) for part in routes))
