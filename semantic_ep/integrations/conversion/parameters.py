"""Which parameters of a Hugging Face model and of a Megatron model are the same.

One table of `Rule`s a family. A rule names a parameter of a Megatron decoder layer, the parameters
of the Hugging Face layer it is made of, and how these are joined. Names are those that Megatron's
distributed checkpoints use for modules without Transformer Engine; where its modules fold a norm
into the linear layer after it, that name is accepted too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """What joining queries, keys and values needs to know.

    Attributes:
        query_heads: Attention heads.
        groups: Key-value heads.
    """

    query_heads: int
    groups: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Join:
    """A bijection between some Hugging Face tensors and one Megatron tensor.

    Attributes:
        forward: The Hugging Face tensors, in the order of the rule, to the Megatron tensor.
        back: The inverse, bit for bit.
    """

    forward: Callable[[Sequence[Tensor], Heads], Tensor]
    back: Callable[[Tensor, Heads], Sequence[Tensor]]


def _interleave_heads(tensors: Sequence[Tensor], heads: Heads) -> Tensor:
    """[N * d, ...], [n * d, ...], [n * d, ...] to [n, N / n + 2, d, ...] flattened."""
    query, key, value = (t.reshape(heads.groups, -1, *t.shape[1:]) for t in tensors)
    return torch.cat([query, key, value], dim=1).reshape(-1, *tensors[0].shape[1:])


def _split_heads(tensor: Tensor, heads: Heads) -> Sequence[Tensor]:
    share = heads.query_heads // heads.groups
    grouped = tensor.reshape(heads.groups, -1, *tensor.shape[1:])
    width = grouped.shape[1] // (share + 2)
    parts = grouped.split([share * width, width, width], dim=1)
    return [part.reshape(-1, *tensor.shape[1:]) for part in parts]


def _split_pairs(tensor: Tensor) -> Tensor:
    """Rows gate_0, up_0, gate_1, … to all of gate, then all of up."""
    return torch.cat([tensor[0::2], tensor[1::2]])


def _join_pairs(tensor: Tensor) -> Tensor:
    gate, up = tensor.chunk(2)
    return torch.stack([gate, up], dim=1).reshape(tensor.shape)


SAME = Join(forward=lambda t, _: t[0], back=lambda t, _: [t])
"""The same tensor."""
STACK = Join(forward=lambda t, _: torch.cat(list(t)), back=lambda t, _: t.chunk(2))
"""Gate and up projection, one above the other."""
HEADS = Join(forward=_interleave_heads, back=_split_heads)
"""Queries, keys and values, interleaved by key-value head."""
TRANSPOSE = Join(forward=lambda t, _: t[0].t(), back=lambda t, _: [t.t()])
"""Stored input by output."""
PAIRS = Join(forward=lambda t, _: _split_pairs(t[0]), back=lambda t, _: [_join_pairs(t)])
"""Gate and up interleaved (a bias)."""
PAIRS_TRANSPOSE = Join(
    forward=lambda t, _: _split_pairs(t[0].t()), back=lambda t, _: [_join_pairs(t).t()]
)
"""Gate and up interleaved, stored input by output."""

ALL, DENSE, MOE = "all", "dense", "moe"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One Megatron parameter of a decoder layer.

    Attributes:
        megatron: Its name below the layer; the first is written, each is read.
        huggingface: Names below the Hugging Face layer; `{expert}` stands for the logical expert.
        join: How they are joined.
        layers: `ALL`, `DENSE` or `MOE`.
        experts: One such parameter an expert; a Hugging Face name without `{expert}` is a tensor
            with experts along its first axis.
        rows: The first axis is the expert (router).
    """

    megatron: tuple[str, ...]
    huggingface: tuple[str, ...]
    join: Join = SAME
    layers: str = ALL
    experts: bool = False
    rows: bool = False


def attention(*, bias: bool, norms: bool, output_bias: bool = False) -> tuple[Rule, ...]:
    """Grouped-query attention: biases of q, k, v; q and k norms of a head; bias of the output."""
    projections = ("q_proj", "k_proj", "v_proj")
    rules = [
        Rule(
            megatron=(f"self_attention.linear_qkv.{kind}",),
            huggingface=tuple(f"self_attn.{name}.{kind}" for name in projections),
            join=HEADS,
        )
        for kind in (("weight", "bias") if bias else ("weight",))
    ]
    rules += [
        _same(f"self_attention.linear_proj.{k}", f"self_attn.o_proj.{k}")
        for k in _kinds(output_bias)
    ]
    if norms:
        rules += [
            _same(f"self_attention.{x}_layernorm.weight", f"self_attn.{x}_norm.weight")
            for x in "qk"
        ]
    rules += [
        Rule(
            megatron=("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
            huggingface=("input_layernorm.weight",),
        ),
        Rule(
            megatron=("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
            huggingface=("post_attention_layernorm.weight",),
        ),
    ]
    return tuple(rules)


def latent_attention(*, low_rank_queries: bool) -> tuple[Rule, ...]:
    """Multi-head latent attention; queries of their own low rank or not."""
    names = {"linear_kv_down_proj": "kv_a_proj_with_mqa", "linear_kv_up_proj": "kv_b_proj"}
    if low_rank_queries:
        names |= {"linear_q_down_proj": "q_a_proj", "linear_q_up_proj": "q_b_proj"}
    else:
        names |= {"linear_q_proj": "q_proj"}
    rules = [
        _same(f"self_attention.{m}.weight", f"self_attn.{h}.weight")
        for m, h in (names | {"linear_proj": "o_proj"}).items()
    ]
    rules += [
        Rule(
            megatron=(
                f"self_attention.{x}_layernorm.weight",
                f"self_attention.linear_{x}_up_proj.layer_norm_weight",
            ),
            huggingface=(f"self_attn.{x}_a_layernorm.weight",),
        )
        for x in (("q", "kv") if low_rank_queries else ("kv",))
    ]
    rules += [
        _same("input_layernorm.weight", "input_layernorm.weight"),
        Rule(
            megatron=("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
            huggingface=("post_attention_layernorm.weight",),
        ),
    ]
    return tuple(rules)


def dense_mlp() -> tuple[Rule, ...]:
    """The gated MLP of layers without experts."""
    return tuple(
        dataclasses.replace(rule, layers=DENSE) for rule in _gated("mlp", "mlp", _PROJECTIONS)
    )


def routed_experts(
    block: str, names: tuple[str, str, str] | None = None, *, bias: bool = False
) -> tuple[Rule, ...]:
    """Router and experts in the per-expert form of the Hub; `names` are gate, up, down."""
    rules = [
        dataclasses.replace(rule, experts=True, layers=MOE)
        for rule in _gated(
            "mlp.experts.experts", f"{block}.experts.{{expert}}", names or _PROJECTIONS
        )
    ]
    rules.append(_router("weight", f"{block}.gate.weight"))
    if bias:
        rules.append(_router("expert_bias", f"{block}.gate.e_score_correction_bias"))
    return tuple(rules)


def fused_biased_experts() -> tuple[Rule, ...]:
    """Router and experts of gpt-oss, with biases, fused and transposed."""
    parts = {
        "linear_fc1.weight": ("gate_up_proj", PAIRS_TRANSPOSE),
        "linear_fc1.bias": ("gate_up_proj_bias", PAIRS),
        "linear_fc2.weight": ("down_proj", TRANSPOSE),
        "linear_fc2.bias": ("down_proj_bias", SAME),
    }
    rules = [
        Rule(
            megatron=(f"mlp.experts.experts.{m}",),
            huggingface=(f"mlp.experts.{h}",),
            join=join,
            layers=MOE,
            experts=True,
        )
        for m, (h, join) in parts.items()
    ]
    rules += [_router(kind, f"mlp.router.{kind}") for kind in ("weight", "bias")]
    return tuple(rules)


def shared_expert(name: str, *, gate: bool = False) -> tuple[Rule, ...]:
    """The expert that every token takes, and the gate on its output."""
    rules = [*_gated("mlp.shared_experts", f"mlp.{name}", _PROJECTIONS)]
    if gate:
        rules.append(_same("mlp.shared_experts.gate_weight", f"mlp.{name}_gate.weight"))
    return tuple(dataclasses.replace(rule, layers=MOE) for rule in rules)


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _kinds(bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if bias else ("weight",)


def _same(megatron: str, huggingface: str) -> Rule:
    return Rule(megatron=(megatron,), huggingface=(huggingface,))


def _router(kind: str, huggingface: str) -> Rule:
    return Rule(megatron=(f"mlp.router.{kind}",), huggingface=(huggingface,), layers=MOE, rows=True)


def _gated(megatron: str, huggingface: str, names: tuple[str, str, str]) -> tuple[Rule, ...]:
    gate, up, down = (f"{huggingface}.{name}.weight" for name in names)
    return (
        Rule(megatron=(f"{megatron}.linear_fc1.weight",), huggingface=(gate, up), join=STACK),
        Rule(megatron=(f"{megatron}.linear_fc2.weight",), huggingface=(down,)),
    )
