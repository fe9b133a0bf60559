"""Build the Megatron model that a checkpoint's arguments describe, from local modules (no TE)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import (
    MLATransformerConfig,
    TransformerConfig,
)

from semantic_ep.integrations.conversion.settings import architecture

_SAME_NAME = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("ffn_hidden_size", "normalization", "qk_layernorm", "add_qkv_bias", "add_bias_linear"),
    *("rotary_interleaved", "glu_linear_offset", "softmax_type", "moe_ffn_hidden_size"),
    *("moe_shared_expert_gate", "moe_router_topk", "moe_router_score_function"),
    *("moe_router_pre_softmax", "moe_router_topk_scaling_factor"),
    "moe_router_enable_expert_bias",
)
_LATENT = (
    *("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type"),
    *("rotary_base", "rotary_scaling_factor", "beta_fast", "beta_slow", "mscale"),
    "mscale_all_dim",
)
_UNSET_IF_ZERO = (
    *("activation_func_clamp_value", "moe_shared_expert_intermediate_size"),
    *("moe_router_num_groups", "moe_router_group_topk", "window_size", "window_attn_skip_freq"),
)


class LatentDotProductAttention(DotProductAttention):
    """Core attention that latent attention can build: 0.16's own does not know its arguments."""

    def __init__(
        self,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Build; the width of the values is `kv_channels` of the configuration."""
        super().__init__(*args, **kwargs)
        assert v_channels in (None, self.hidden_size_per_attention_head)


def transformer_config(recorded: Mapping[str, Any], **changes: Any) -> TransformerConfig:
    """Megatron's configuration of the model that recorded arguments describe.

    Args:
        recorded: Arguments as a checkpoint records them.
        **changes: Further fields: parallel sizes, dtypes, losses.

    Raises:
        CheckpointError: An argument is missing.
    """
    a = architecture(recorded)
    gated = a["swiglu"] or a["quick_geglu"]
    settings = {name: a[name] for name in _SAME_NAME}
    settings |= {name: a[name] or None for name in _UNSET_IF_ZERO}
    frequency = a["moe_layer_freq"]
    settings |= {
        "num_moe_experts": a["num_experts"],
        "moe_layer_freq": frequency if isinstance(frequency, int) else list(frequency),
        "window_attn_skip_freq": list(a["window_attn_skip_freq"]) or None,
        "layernorm_epsilon": a["norm_epsilon"],
        "gated_linear_unit": gated,
        "activation_func": quick_gelu if a["quick_geglu"] else torch.nn.functional.silu,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
    }
    if a["multi_latent_attention"]:
        settings |= {name: a[name] for name in _LATENT} | {"q_lora_rank": a["q_lora_rank"] or None}
        settings["original_max_position_embeddings"] = a["original_max_position_embeddings"] or 4096
        return MLATransformerConfig(**(settings | changes))
    config = TransformerConfig(**(settings | changes))
    if a["position_embedding_type"] == "yarn":
        plain = ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale")
        for name in ("rotary_scaling_factor", *plain, "mscale_all_dim"):
            setattr(config, f"yarn_{name}", a[name])
        rounded = a["yarn_correction_range_round_to_int"]
        config.yarn_correction_range_round_to_int = rounded
    return config


def gpt_model(recorded: Mapping[str, Any], **changes: Any) -> GPTModel:
    """Build the model, uninitialised by any checkpoint; Megatron's groups must exist.

    Args:
        recorded: Arguments as a checkpoint records them, with `padded_vocab_size`.
        **changes: Further fields of the configuration.
    """
    a, config = architecture(recorded), transformer_config(recorded, **changes)
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization
    )
    if config.multi_latent_attention:
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = LatentDotProductAttention
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=int(recorded["padded_vocab_size"]),
        max_sequence_length=a["max_position_embeddings"],
        share_embeddings_and_output_weights=not a["untie_embeddings_and_output_weights"],
        position_embedding_type=a["position_embedding_type"],
        rotary_base=a["rotary_base"],
        rotary_percent=a["rotary_percent"],
    )
