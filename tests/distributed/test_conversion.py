"""Hugging Face <-> Megatron: the same logits, and the same bytes after a round trip."""

import json
import logging

import numpy as np
import pytest
import torch

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from semantic_ep.errors import CheckpointError
from tests.distributed.launcher import run_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the seams for CPU are inactive here"),
]

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WIDTHS = {"intermediate_size": 64, "moe_intermediate_size": 48}
LATENT = {
    **WIDTHS,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "routed_scaling_factor": 1.5,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "mixtral": {"intermediate_size": 48, "num_local_experts": 8},
    "qwen2_moe": {
        **WIDTHS,
        "shared_expert_intermediate_size": 40,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        **WIDTHS,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 12,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "glm4_moe": {
        **WIDTHS,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "use_qk_norm": True,
        "attention_bias": True,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v2": {
        **LATENT,
        "q_lora_rank": None,
        "num_experts_per_tok": 2,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7},
    },
    "deepseek_v3": {
        **LATENT,
        "q_lora_rank": 24,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 2,
        "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    },
    "gpt_oss": {
        "intermediate_size": 48,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 5,
        "swiglu_limit": 0.5,
        "rope_parameters": {**YARN, "truncate": False},
    },
}
TOKEN_ID = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(1))


def random_model(family):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**COMMON, **MODELS[family]}))
    with torch.no_grad():  # No norm, bias or sink may be one that could be lost unseen.
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and "inv_freq" not in name:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()


def tensors(directory):
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def megatron_logits(directory, token_id):
    """Of Megatron's own model, with every tensor loaded by its own checkpointing."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from semantic_ep.integrations.conversion.distributed_checkpoint import DistributedCheckpoint
    from semantic_ep.integrations.conversion.model import gpt_model

    checkpoint = DistributedCheckpoint(directory)
    model = gpt_model(checkpoint.arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    loaded = dist_checkpointing.load(
        {"model": model.sharded_state_dict()},
        str(checkpoint.directory),
        strict=StrictHandling.RAISE_ALL,
    )
    model.load_state_dict(loaded["model"])
    length = token_id.shape[1]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        return model(token_id, torch.arange(length).expand_as(token_id), later)


def _round_trips(rank, world_size, directory):
    from semantic_ep.integrations.conversion import (
        huggingface_to_megatron,
        megatron_to_huggingface,
    )
    from tests.distributed import megatron_tiny

    megatron_tiny.start(expert_parallel=1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    results = {}
    for family in MODELS:
        model = random_model(family)
        source = directory / family
        model.save_pretrained(source)
        with torch.no_grad():
            expected = model(TOKEN_ID).logits
        summary = huggingface_to_megatron(source, directory / f"{family}-megatron")
        found = megatron_logits(directory / f"{family}-megatron", TOKEN_ID)
        megatron_to_huggingface(directory / f"{family}-megatron", directory / f"{family}-back")
        results[family] = (expected.numpy(), found.numpy(), summary.left_out)
    return results


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("converted")
    return directory, run_ranks(_round_trips, 1, directory)[0]


@pytest.mark.parametrize("family", MODELS)
def test_a_family_keeps_its_logits_in_megatron_and_its_bytes_on_the_way_back(converted, family):
    from transformers import AutoModelForCausalLM

    directory, results = converted
    expected, in_megatron, left_out = results[family]
    np.testing.assert_allclose(in_megatron, expected, rtol=0, atol=1e-5)
    assert not left_out
    before, after = tensors(directory / family), tensors(directory / f"{family}-back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    back = AutoModelForCausalLM.from_pretrained(directory / f"{family}-back").eval()
    with torch.no_grad():
        logits = back(TOKEN_ID).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_the_config_of_the_pattern_is_kept_and_another_model_is_refused(converted, tmp_path):
    from semantic_ep.integrations.conversion import megatron_to_huggingface

    directory = converted[0]
    source, megatron = directory / "qwen2_moe", directory / "qwen2_moe-megatron"
    megatron_to_huggingface(megatron, tmp_path / "like", like=source)
    assert (tmp_path / "like/config.json").read_bytes() == (source / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match="another model"):
        megatron_to_huggingface(megatron, tmp_path / "x", like=directory / "qwen3_moe")
    assert not (tmp_path / "x").exists()


def test_a_plan_in_the_source_is_undone_on_the_way(converted, tmp_path):
    from semantic_ep.apply.checkpoint import Checkpoint, apply_layout
    from semantic_ep.apply.layout import Layout
    from semantic_ep.integrations.conversion import (
        huggingface_to_megatron,
        megatron_to_huggingface,
    )

    source = converted[0] / "mixtral"
    order = np.stack([np.random.default_rng(layer).permutation(8) for layer in range(3)])
    fingerprint = Checkpoint.open(source).fingerprint()
    layout = Layout(physical_to_logical_map=order, fingerprint=fingerprint)
    apply_layout(source, layout, tmp_path / "planned")
    huggingface_to_megatron(tmp_path / "planned", tmp_path / "megatron")
    megatron_to_huggingface(tmp_path / "megatron", tmp_path / "back")
    before, after = tensors(source), tensors(tmp_path / "back")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_arguments_that_newer_releases_keep_among_the_tensors_are_read(tmp_path):
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint import DefaultSavePlanner

    from semantic_ep.integrations.conversion.distributed_checkpoint import DistributedCheckpoint

    common = [{"args": {"num_layers": "2"}, "iteration": 4}]
    dcp.save(
        {"common_state/shard_0_1": common},
        checkpoint_id=tmp_path,
        planner=DefaultSavePlanner(flatten_state_dict=False),
        no_dist=True,
    )
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    assert DistributedCheckpoint(tmp_path).arguments == {"num_layers": "2"}


def test_what_megatron_cannot_express_is_refused_with_the_reason(tmp_path):
    from transformers import CONFIG_MAPPING

    from semantic_ep.integrations.conversion.families import to_huggingface, to_megatron

    def config(family, **changes):
        return CONFIG_MAPPING[family](**{**COMMON, **MODELS.get(family, {}), **changes})

    with pytest.raises(CheckpointError, match="span all heads"):
        to_megatron(config("olmoe"))
    with pytest.raises(CheckpointError, match="by its best 1 experts"):
        to_megatron(config("deepseek_v3", num_experts_per_tok=2))
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(CheckpointError, match="partial_rotary_factor"):
        to_megatron(config("qwen3_moe", rope_parameters=rope))
    recorded = {**to_megatron(config("mixtral")), "normalization": "LayerNorm"}
    with pytest.raises(CheckpointError, match="normalization = 'LayerNorm', not 'RMSNorm'"):
        to_huggingface(recorded)


def test_the_command_writes_what_it_says(converted, tmp_path, capsys):
    from semantic_ep.cli import main

    source = str(converted[0] / "gpt_oss-megatron")
    words = ["convert", "--from", "megatron", "--to", "hf", "--checkpoint", source, "--json"]
    assert main([*words, "--out", str(tmp_path / "model")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["family"] == "gpt_oss"
    assert summary["tensors"] == len(tensors(tmp_path / "model"))
    assert main([*words, "--out", str(tmp_path / "model")]) == 2
