"""Which keys of config.json and which Megatron arguments mean the same.

Arguments have the names of Megatron's command line, under which its checkpoints record them. Each
`Setting` translates both ways; a conversion is accepted only if translating forth and back gives
the same arguments, so that a setting which one side lacks is found and named.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from semantic_ep.errors import CheckpointError, explain

Arguments = dict[str, Any]

DEFAULTS: Mapping[str, Any] = {
    "group_query_attention": False,
    "num_query_groups": 1,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "qk_layernorm": False,
    "add_qkv_bias": False,
    "add_bias_linear": False,
    "swiglu": False,
    "quick_geglu": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": 0.0,
    "softmax_type": "vanilla",
    "window_size": (),
    "window_attn_skip_freq": (),
    "untie_embeddings_and_output_weights": False,
    "moe_layer_freq": 1,
    "moe_shared_expert_intermediate_size": 0,
    "moe_shared_expert_gate": False,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_num_groups": 0,
    "moe_router_group_topk": 0,
    "moe_router_topk_scaling_factor": 1.0,
    "moe_router_enable_expert_bias": False,
    "moe_latent_size": 0,
    "mtp_num_layers": 0,
    "multi_latent_attention": False,
    "q_lora_rank": 0,
    "kv_lora_rank": 0,
    "qk_head_dim": 0,
    "qk_pos_emb_head_dim": 0,
    "v_head_dim": 0,
    "rope_type": "rope",
    "rotary_scaling_factor": 1.0,
    "original_max_position_embeddings": 0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "yarn_correction_range_round_to_int": True,
}
"""Arguments that decide what a model computes and have a default; None means the default."""
_REQUIRED = (
    *("num_layers", "hidden_size", "num_attention_heads", "kv_channels", "ffn_hidden_size"),
    *("max_position_embeddings", "num_experts", "moe_ffn_hidden_size", "moe_router_topk"),
)


def architecture(recorded: Mapping[str, Any]) -> Arguments:
    """The arguments that decide what a model computes, from all that a checkpoint records.

    Args:
        recorded: Values, or their `str`.

    Raises:
        CheckpointError: One that has no default is missing.
    """
    values = {name: _parsed(value) for name, value in recorded.items()}
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    if values.get("kv_channels") is None and heads and hidden:
        values["kv_channels"] = hidden // heads
    missing = [name for name in _REQUIRED if values.get(name) is None]
    if missing:
        raise CheckpointError(
            explain(
                f"the recorded arguments lack {', '.join(missing)}",
                where="the checkpoint's args",
                do="Convert a checkpoint that records its arguments, of a mixture of experts",
            )
        )
    chosen = {name: values[name] for name in _REQUIRED}
    for name, default in DEFAULTS.items():
        value = values.get(name)
        chosen[name] = default if value is None else value
    return _without_unused(chosen)


def moe_pattern(arguments: Mapping[str, Any]) -> tuple[bool, ...]:
    """Whether each decoder layer is an MoE layer."""
    frequency, layers = arguments["moe_layer_freq"], arguments["num_layers"]
    if isinstance(frequency, int):
        return tuple(layer % frequency == 0 for layer in range(layers))
    return tuple(bool(flag) for flag in frequency)


def differences(found: Arguments, expected: Arguments) -> list[str]:
    """Arguments that differ, as "name = found, not expected"."""
    names = sorted(found.keys() | expected.keys())
    return [
        f"{name} = {found.get(name)!r}, not {expected.get(name)!r}"
        for name in names
        if _plain(found.get(name)) != _plain(expected.get(name))
    ]


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _without_unused(arguments: Arguments) -> Arguments:
    """Give arguments without an effect one value, so that they compare equal."""
    if all(moe_pattern(arguments)):
        arguments |= {"moe_layer_freq": 1, "ffn_hidden_size": arguments["moe_ffn_hidden_size"]}
    if arguments["multi_latent_attention"]:
        arguments |= {"kv_channels": arguments["v_head_dim"], "group_query_attention": False}
    if not arguments["group_query_attention"]:
        arguments["num_query_groups"] = arguments["num_attention_heads"]
    arguments["group_query_attention"] = (
        arguments["num_query_groups"] != arguments["num_attention_heads"]
    )
    return arguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A translation of some keys of config.json to some arguments, and back.

    Attributes:
        forward: Configuration object of transformers to arguments; raises `CheckpointError` for
            what Megatron cannot express.
        back: Arguments to keys of config.json.
    """

    forward: Callable[[Any], Arguments]
    back: Callable[[Arguments], dict[str, Any]]


def same(huggingface: str, megatron: str) -> Setting:
    """The same value under another name."""
    return Setting(
        forward=lambda config: {megatron: getattr(config, huggingface)},
        back=lambda arguments: {huggingface: arguments[megatron]},
    )


def opposite(huggingface: str, megatron: str) -> Setting:
    """A switch that is on where the other is off."""
    return Setting(
        forward=lambda config: {megatron: not getattr(config, huggingface)},
        back=lambda arguments: {huggingface: not arguments[megatron]},
    )


def always(**arguments: Any) -> Setting:
    """Arguments that every model of the family has."""
    return Setting(forward=lambda config: dict(arguments), back=lambda _: {})


def only(huggingface: str, *values: Any, why: str) -> Setting:
    """A key whose other values Megatron cannot express; the first value is written back."""

    def check(config: Any) -> Arguments:
        found = getattr(config, huggingface, values[0])
        if found not in values:
            raise inexpressible(f"{huggingface} = {found!r}: {why}", allowed=values)
        return {}

    return Setting(forward=check, back=lambda _: {huggingface: values[0]})


def inexpressible(reason: str, *, allowed: Any = None) -> CheckpointError:
    """The error for what Megatron cannot express."""
    return CheckpointError(
        explain(
            f"Megatron-core cannot express this model: {reason}",
            where="config.json",
            allowed=allowed,
        )
    )


def grouped_queries() -> Setting:
    """Key-value heads and the width of a head."""

    def forward(config: Any) -> Arguments:
        groups = config.num_key_value_heads
        width = getattr(config, "head_dim", None)
        return {
            "group_query_attention": groups != config.num_attention_heads,
            "num_query_groups": groups,
            "kv_channels": width or config.hidden_size // config.num_attention_heads,
        }

    return Setting(
        forward=forward,
        back=lambda a: {
            "num_key_value_heads": a["num_query_groups"],
            "head_dim": a["kv_channels"],
        },
    )


def rotary(*, partial: bool = False) -> Setting:
    """Rotary embedding without scaling, on a part of the head where `partial`."""

    def forward(config: Any) -> Arguments:
        rope = _rope(config, "default")
        percent = rope.get("partial_rotary_factor", 1.0)
        if percent != 1.0 and not partial:
            raise inexpressible(f"partial_rotary_factor = {percent} in this family")
        return {"rotary_base": _whole(rope["rope_theta"]), "rotary_percent": percent}

    def back(arguments: Arguments) -> dict[str, Any]:
        rope = {"rope_type": "default", "rope_theta": float(arguments["rotary_base"])}
        if partial:
            rope["partial_rotary_factor"] = arguments["rotary_percent"]
        return {"rope_parameters": rope}

    return Setting(forward=forward, back=back)


def scaled_rotary(*, latent: bool) -> Setting:
    """Rotary embedding with or without YaRN, of latent (MLA) or plain attention."""
    key = "rope_type" if latent else "position_embedding_type"

    def forward(config: Any) -> Arguments:
        rope = _rope(config, "default", "yarn")
        arguments = {"rotary_base": _whole(rope["rope_theta"])}
        if rope["rope_type"] == "default":
            return {**arguments, key: "rope"}
        if rope.get("attention_factor") is not None:
            raise inexpressible("rope_parameters.attention_factor is set")
        mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        if (all_dim and not mscale) or (mscale and not all_dim and mscale != 1):
            raise inexpressible("rope_parameters has one of mscale and mscale_all_dim")
        truncate = rope.get("truncate", True)
        if latent and not truncate:
            raise inexpressible("rope_parameters.truncate = false in latent attention")
        return arguments | {
            key: "yarn",
            "rotary_scaling_factor": rope["factor"],
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
            "beta_fast": rope.get("beta_fast") or 32.0,
            "beta_slow": rope.get("beta_slow") or 1.0,
            "mscale": mscale or 1.0,
            "mscale_all_dim": all_dim or 0.0,
            "yarn_correction_range_round_to_int": truncate,
        }

    def back(arguments: Arguments) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_theta": float(arguments["rotary_base"])}
        if arguments[key] != "yarn":
            return {"rope_parameters": rope | {"rope_type": "default"}}
        names = ("original_max_position_embeddings", "beta_fast", "beta_slow")
        rope |= {"rope_type": "yarn", "factor": arguments["rotary_scaling_factor"]}
        rope |= {name: arguments[name] for name in names}
        if arguments["mscale_all_dim"]:
            rope |= {name: arguments[name] for name in ("mscale", "mscale_all_dim")}
        if not latent:
            rope["truncate"] = arguments["yarn_correction_range_round_to_int"]
        return {"rope_parameters": rope}

    return Setting(forward=forward, back=back)


def sliding_window() -> Setting:
    """Layers that see only the last `sliding_window` tokens, themselves included."""

    def forward(config: Any) -> Arguments:
        flags = tuple(int(kind == "sliding_attention") for kind in config.layer_types)
        if not any(flags):
            return {}
        return {"window_size": (config.sliding_window - 1, 0), "window_attn_skip_freq": flags}

    def back(arguments: Arguments) -> dict[str, Any]:
        flags = arguments["window_attn_skip_freq"] or (0,) * arguments["num_layers"]
        if isinstance(flags, int):
            flags = tuple(int((n + 1) % flags != 0) for n in range(arguments["num_layers"]))
        kinds = ["sliding_attention" if flag else "full_attention" for flag in flags]
        window = arguments["window_size"]
        return {"layer_types": kinds, "sliding_window": window[0] + 1 if window else None}

    return Setting(forward=forward, back=back)


def groups_of_two() -> Setting:
    """Group-limited routing that scores a group by the sum of its two best experts."""

    def forward(config: Any) -> Arguments:
        groups, kept = config.n_group or 1, config.topk_group or 1
        if kept >= groups:
            return {}
        if config.num_experts_per_tok // kept != 2:
            raise inexpressible(
                f"it scores a group by its best {config.num_experts_per_tok // kept} experts "
                "(num_experts_per_tok // topk_group), the model by its best 2"
            )
        return {"moe_router_num_groups": groups, "moe_router_group_topk": kept}

    return Setting(
        forward=forward,
        back=lambda a: {
            "n_group": a["moe_router_num_groups"] or 1,
            "topk_group": a["moe_router_group_topk"] or 1,
        },
    )


def groups_of_best() -> Setting:
    """Group-limited routing that scores a group by its best expert (DeepSeek-V2)."""

    def forward(config: Any) -> Arguments:
        if config.topk_method == "greedy":
            return {}
        if config.topk_method != "group_limited_greedy":
            raise inexpressible(f"topk_method = {config.topk_method!r}")
        if config.num_experts_per_tok // config.topk_group != 1:
            raise inexpressible(
                f"it scores a group by its best {config.num_experts_per_tok // config.topk_group} "
                "experts (num_experts_per_tok // topk_group), the model by its best one"
            )
        return {
            "moe_router_num_groups": config.n_group,
            "moe_router_group_topk": config.topk_group,
        }

    def back(arguments: Arguments) -> dict[str, Any]:
        groups = arguments["moe_router_num_groups"]
        return {
            "topk_method": "group_limited_greedy" if groups else "greedy",
            "n_group": groups or None,
            "topk_group": arguments["moe_router_group_topk"] or None,
        }

    return Setting(forward=forward, back=back)


def shared_experts() -> Setting:
    """`n_shared_experts` that Megatron holds as one wide expert."""

    def forward(config: Any) -> Arguments:
        if not config.n_shared_experts:
            raise inexpressible("n_shared_experts = 0: the family has at least one")
        width = config.n_shared_experts * config.moe_intermediate_size
        return {"moe_shared_expert_intermediate_size": width}

    def back(arguments: Arguments) -> dict[str, Any]:
        width = arguments["moe_shared_expert_intermediate_size"]
        return {"n_shared_experts": width // arguments["moe_ffn_hidden_size"]}

    return Setting(forward=forward, back=back)


def low_rank_queries() -> Setting:
    """Rank of the queries' projection; None for a full one."""
    return Setting(
        forward=lambda config: {"q_lora_rank": config.q_lora_rank},
        back=lambda arguments: {"q_lora_rank": arguments["q_lora_rank"] or None},
    )


def _rope(config: Any, *kinds: str) -> dict[str, Any]:
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type", "default") not in kinds or "rope_theta" not in rope:
        raise inexpressible(
            f"rope_parameters = {rope}", allowed=f"rope_type {' or '.join(kinds)}, for all layers"
        )
    return {"rope_type": "default", **rope}


def _whole(number: float) -> float:
    return int(number) if float(number).is_integer() else number
