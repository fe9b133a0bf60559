"""Attention heads sharded over an EP group by DeepSpeed's automatic tensor parallelism (AutoTP).

`deepspeed.init_inference` is told to shard attention modules only: it makes their query, key and
value projections column-parallel and the output projection row-parallel, leaves DeepSeek's latent
projections whole, and shards the head of the model. Left to itself it would shard shared experts
too, which work on different tokens on every rank here. transformers' own tensor parallelism was
the alternative: it needs `accelerate`, loads the model itself, and reduces to all ranks inside
its modules.

What AutoTP does not reach is done here: gpt-oss' attention sinks, one for each head, are cut;
norms of queries and keys over all heads at once (OLMoE) take their mean over the group; and in
layers with an MoE block the output projection leaves its partial sums to the shuffled
reduce-scatter.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from semantic_ep.errors import BackendError, explain
from semantic_ep.integrations.transformers import decoder_layer_of, find_moe_layers
from semantic_ep.runtime.collectives import peer_guard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_SETTING = "semantic_ep.serve.attention, --semantic-ep-serve-attention"


def check_heads(model: nn.Module, ranks: int) -> None:
    """Raise `BackendError` unless the heads of a model can be divided among ranks."""
    config = model.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name)
        if heads % ranks:
            raise BackendError(
                explain(
                    f"{name} = {heads} cannot be divided among {ranks} ranks",
                    where=_SETTING,
                    got="tp",
                    allowed=f"a number of ranks that divides {heads}",
                    do='Set it to "dp", or start another number of ranks',
                )
            )


def tensor_parallel_config(model: nn.Module, group: ProcessGroup) -> dict[str, Any]:
    """Part of the config of `deepspeed.init_inference` that shards the attention of a model."""
    kinds = {type(attention) for _, attention in _attention_modules(model)}
    return {
        "tensor_parallel": {
            "tp_size": group.size(),
            "tp_group": group,
            "mpu": _Mpu(group=group),
        },
        # The name as AutoTP spells it for a direct child of the module that it replaces in.
        "injection_policy": dict.fromkeys(kinds, (".o_proj",)),
    }


def cut_heads(model: nn.Module, group: ProcessGroup) -> None:
    """Keep what belongs to this rank's heads outside of projections, in place: sinks and norms."""
    for _, attention in _attention_modules(model):
        if hasattr(attention, "sinks"):
            own = attention.sinks.data.chunk(group.size())[group.rank()]
            attention.sinks = nn.Parameter(own.clone(), requires_grad=False)
        for name in ("q_norm", "k_norm"):
            norm = getattr(attention, name, None)
            if norm is not None and norm.weight.numel() != attention.head_dim:
                setattr(attention, name, ShardedRMSNorm(norm, group))


class ShardedRMSNorm(nn.Module):
    """RMS norm of a vector whose elements lie on the ranks of a group, in order. Communicates.

    Args:
        norm: Of the whole vector, as transformers' models have it.
        group: Its ranks have equal shares.
    """

    def __init__(self, norm: nn.Module, group: ProcessGroup) -> None:
        super().__init__()
        own = norm.weight.data.chunk(group.size())[group.rank()]
        self.weight = nn.Parameter(own.clone(), requires_grad=False)
        self.eps: float = norm.variance_epsilon
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., D / G], this rank's elements."""
        exact = x.float()
        squares = exact.square().sum(-1, keepdim=True)
        with peer_guard("all-reduce of a norm over all heads", self._group):
            dist.all_reduce(squares, group=self._group)
        mean = squares / (x.shape[-1] * self._group.size())
        return self.weight * (exact * torch.rsqrt(mean + self.eps)).to(x.dtype)


def prepare_reductions(model: nn.Module, group: ProcessGroup) -> None:
    """Leave partial sums in layers with an MoE block; name the failure of a peer in the others."""
    from deepspeed.module_inject.layers import LinearAllreduce

    for site in find_moe_layers(model):
        # DeepSpeed's row-parallel layer does not reduce without a group.
        decoder_layer_of(model, site).self_attn.o_proj.mp_group = None
    for module in model.modules():
        if isinstance(module, LinearAllreduce) and module.mp_group is not None:
            module.forward = functools.partial(_guarded, module.forward, group)


def _guarded(forward: Callable[[Tensor], Tensor], group: ProcessGroup, x: Tensor) -> Tensor:
    with peer_guard("all-reduce of tensor parallelism", group):
        return forward(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Mpu:
    """How DeepSpeed takes a process group of ours instead of making its own."""

    group: ProcessGroup

    def get_model_parallel_group(self) -> ProcessGroup:
        return self.group


def _attention_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if name.endswith(".self_attn")]
