"""The families that can be converted, and why the others cannot."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from semantic_ep.apply.families import family_of
from semantic_ep.errors import CheckpointError, explain
from semantic_ep.integrations.conversion import parameters as p
from semantic_ep.integrations.conversion import settings as s
from semantic_ep.integrations.conversion.parameters import Rule
from semantic_ep.integrations.conversion.settings import Arguments, Setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """One family.

    Attributes:
        settings: Translations of its config, which together give every argument.
        rules: Arguments of a model to the parameters of its decoder layers.
    """

    settings: tuple[Setting, ...]
    rules: Callable[[Arguments], tuple[Rule, ...]]


REFUSED: Mapping[str, str] = {
    "olmoe": "its norms of queries and keys span all heads, Megatron's a single head",
}
"""Families of `semantic_ep.apply.families` that Megatron-core cannot express, and why."""

_COMMON = (
    s.same("num_hidden_layers", "num_layers"),
    s.same("hidden_size", "hidden_size"),
    s.same("num_attention_heads", "num_attention_heads"),
    s.same("rms_norm_eps", "norm_epsilon"),
    s.same("max_position_embeddings", "max_position_embeddings"),
    s.same("num_experts_per_tok", "moe_router_topk"),
    s.opposite("tie_word_embeddings", "untie_embeddings_and_output_weights"),
    s.only("hidden_act", "silu", why="the activation is SwiGLU"),
    s.always(normalization="RMSNorm"),
)
_MOE_AND_DENSE = (
    s.same("intermediate_size", "ffn_hidden_size"),
    s.same("moe_intermediate_size", "moe_ffn_hidden_size"),
)
_EVERY_LAYER = Setting(
    forward=lambda config: {
        "ffn_hidden_size": config.intermediate_size,
        "moe_ffn_hidden_size": config.intermediate_size,
    },
    back=lambda arguments: {"intermediate_size": arguments["moe_ffn_hidden_size"]},
)
_SWIGLU = s.always(swiglu=True)
_NO_WINDOW = s.only("sliding_window", None, 0, why="windows are converted for gpt-oss only")
_QWEN = (
    *_COMMON,
    *_MOE_AND_DENSE,
    _SWIGLU,
    s.grouped_queries(),
    s.rotary(),
    s.same("num_experts", "num_experts"),
    s.opposite("norm_topk_prob", "moe_router_pre_softmax"),
    s.only("use_sliding_window", False, why="windows are converted for gpt-oss only"),
    Setting(
        forward=lambda config: {"moe_layer_freq": _pattern(config)},
        back=lambda a: {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [n for n, moe in enumerate(s.moe_pattern(a)) if not moe],
        },
    ),
)
_FIRST_DENSE = Setting(
    forward=lambda config: {"moe_layer_freq": _pattern(config)},
    back=lambda a: {"first_k_dense_replace": s.moe_pattern(a).index(True)},
)
_SIGMOID = (
    s.always(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True),
    s.only("norm_topk_prob", True, why="sigmoid scores of the chosen experts are normalised"),
    s.same("routed_scaling_factor", "moe_router_topk_scaling_factor"),
    s.groups_of_two(),
)
_LATENT = (
    *_COMMON,
    *_MOE_AND_DENSE,
    _SWIGLU,
    _FIRST_DENSE,
    s.shared_experts(),
    s.same("n_routed_experts", "num_experts"),
    s.scaled_rotary(latent=True),
    s.always(multi_latent_attention=True, qk_layernorm=True),
    s.only("attention_bias", False, why="latent attention has no biases"),
    s.only("rms_norm_eps", 1e-6, why="the model's latent norms keep 1e-6, Megatron has one"),
    s.low_rank_queries(),
    s.same("kv_lora_rank", "kv_lora_rank"),
    s.same("v_head_dim", "v_head_dim"),
    s.same("qk_nope_head_dim", "qk_head_dim"),
    s.same("qk_rope_head_dim", "qk_pos_emb_head_dim"),
    Setting(
        forward=lambda config: {"kv_channels": config.v_head_dim},
        back=lambda a: {"num_key_value_heads": a["num_attention_heads"]},
    ),
)


def _pattern(config: Any) -> tuple[int, ...]:
    shape = family_of(config.to_dict()).shape(config.to_dict())
    return tuple(int(layer in shape.layer_ids) for layer in range(shape.num_layers))


def _latent_rules(arguments: Arguments, *, bias: bool) -> tuple[Rule, ...]:
    return (
        *p.latent_attention(low_rank_queries=bool(arguments["q_lora_rank"])),
        *p.dense_mlp(),
        *p.routed_experts("mlp", bias=bias),
        *p.shared_expert("shared_experts"),
    )


CONVERSIONS: Mapping[str, Conversion] = {
    "mixtral": Conversion(
        settings=(
            *_COMMON,
            _EVERY_LAYER,
            _SWIGLU,
            _NO_WINDOW,
            s.grouped_queries(),
            s.rotary(),
            s.same("num_local_experts", "num_experts"),
        ),
        rules=lambda a: (
            *p.attention(bias=False, norms=False),
            *p.routed_experts("block_sparse_moe", ("w1", "w3", "w2")),
        ),
    ),
    "qwen3_moe": Conversion(
        settings=(
            *_QWEN,
            s.always(qk_layernorm=True),
            s.only("attention_bias", False, why="a bias of the output projection alone"),
        ),
        rules=lambda a: (
            *p.attention(bias=False, norms=True),
            *p.dense_mlp(),
            *p.routed_experts("mlp"),
        ),
    ),
    "qwen2_moe": Conversion(
        settings=(
            *_QWEN,
            s.same("qkv_bias", "add_qkv_bias"),
            s.same("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
            s.always(moe_shared_expert_gate=True),
        ),
        rules=lambda a: (
            *p.attention(bias=a["add_qkv_bias"], norms=False),
            *p.dense_mlp(),
            *p.routed_experts("mlp"),
            *p.shared_expert("shared_expert", gate=True),
        ),
    ),
    "glm4_moe": Conversion(
        settings=(
            *_COMMON,
            *_MOE_AND_DENSE,
            *_SIGMOID,
            _SWIGLU,
            _FIRST_DENSE,
            s.grouped_queries(),
            s.rotary(partial=True),
            s.shared_experts(),
            s.same("n_routed_experts", "num_experts"),
            s.same("attention_bias", "add_qkv_bias"),
            s.same("use_qk_norm", "qk_layernorm"),
        ),
        rules=lambda a: (
            *p.attention(bias=a["add_qkv_bias"], norms=a["qk_layernorm"]),
            *p.dense_mlp(),
            *p.routed_experts("mlp", bias=True),
            *p.shared_expert("shared_experts"),
        ),
    ),
    "deepseek_v2": Conversion(
        settings=(
            *_LATENT,
            s.groups_of_best(),
            s.same("routed_scaling_factor", "moe_router_topk_scaling_factor"),
            s.always(moe_router_pre_softmax=True),
            s.only("norm_topk_prob", False, why="transformers leaves the scores as they are"),
            s.only("mlp_bias", False, why="its MLPs have no biases"),
        ),
        rules=lambda a: _latent_rules(a, bias=False),
    ),
    "deepseek_v3": Conversion(
        settings=(
            *_LATENT,
            *_SIGMOID,
            s.only("rope_interleave", True, why="latent attention rotates neighbours"),
        ),
        rules=lambda a: _latent_rules(a, bias=True),
    ),
    "gpt_oss": Conversion(
        settings=(
            *_COMMON,
            _EVERY_LAYER,
            s.grouped_queries(),
            s.scaled_rotary(latent=False),
            s.sliding_window(),
            s.same("num_local_experts", "num_experts"),
            s.same("swiglu_limit", "activation_func_clamp_value"),
            s.only("swiglu_alpha", 1.702, why="its quick GELU has this factor"),
            s.only("attention_bias", True, why="biases are everywhere or nowhere"),
            s.always(
                add_bias_linear=True,
                quick_geglu=True,
                glu_linear_offset=1.0,
                softmax_type="learnable",
            ),
        ),
        rules=lambda a: (
            *p.attention(bias=True, norms=False, output_bias=True),
            Rule(
                megatron=("self_attention.core_attention.softmax_offset",),
                huggingface=("self_attn.sinks",),
            ),
            *p.fused_biased_experts(),
        ),
    ),
}


def to_megatron(config: Any) -> Arguments:
    """Megatron's arguments of the model that a transformers configuration describes.

    Raises:
        CheckpointError: Megatron-core cannot express it, with the reason.
    """
    family = config.model_type
    if family not in CONVERSIONS:
        raise CheckpointError(
            explain(
                f"{family} cannot be converted: {REFUSED.get(family, 'it is not in the table')}",
                where="config.json, model_type",
                allowed=sorted(CONVERSIONS),
            )
        )
    if getattr(config, "quantization_config", None):
        raise CheckpointError(
            explain(
                "the weights are quantised",
                where="config.json, quantization_config",
                do="Dequantise the model and save it in bf16 first",
            )
        )
    arguments: Arguments = {}
    for setting in CONVERSIONS[family].settings:
        arguments |= setting.forward(config)
    return s.architecture(arguments)


def to_huggingface(recorded: Mapping[str, Any]) -> Any:
    """The transformers configuration of the model that Megatron's arguments describe.

    Args:
        recorded: Arguments as a checkpoint records them.

    Raises:
        CheckpointError: No family has this architecture; says what each would need.
    """
    from transformers import CONFIG_MAPPING

    arguments = s.architecture(recorded)
    reasons = []
    for family, conversion in CONVERSIONS.items():
        keys: dict[str, Any] = {}
        try:
            for setting in conversion.settings:
                keys |= setting.back(arguments)
            config = CONFIG_MAPPING[family](
                **keys, bos_token_id=None, eos_token_id=None, pad_token_id=None
            )
            wrong = s.differences(arguments, to_megatron(config))
        except CheckpointError as error:
            wrong = [str(error)]
        if not wrong:
            return config
        reasons.append(f"{family}: {'; '.join(wrong[:4])}")
    raise CheckpointError(
        explain(
            "no Hugging Face family has this architecture",
            where="the checkpoint's args",
            got="\n  " + "\n  ".join(reasons),
            do="Train a model of one of these families; docs/conversion.md lists their arguments",
        )
    )
