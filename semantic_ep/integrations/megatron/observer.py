"""Watch the routers of a Megatron model and hand what they choose to a routing sink.

Counted is each training token once: the observer is armed while the model's own `forward` runs in
training mode with gradients, so that evaluation and the recomputation of activations, which runs
in the backward pass, are not.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from semantic_ep.errors import BackendError, ConfigError, explain


class RoutingSink(Protocol):
    """What takes routed tokens; see `semantic_ep.observe.recorder`."""

    def record(
        self,
        layer: int,
        expert_TK: torch.Tensor,
        *,
        token_id_T: torch.Tensor | None = None,
        mask_T: torch.Tensor | None = None,
    ) -> None:
        """Count the experts of T tokens in one MoE layer."""


class RouterObserver:
    """Hooks on one model (or pipeline stage) that feed a sink.

    The forward pass must get its token ids as `input_ids`, [batch, sequence], already cut to this
    context-parallel rank, as Megatron's own batches are. Tensor-parallel ranks that see the same
    tokens count them once; with sequence parallelism each counts its part.
    """

    def __init__(self, sink: RoutingSink, *, pad_token_id: int | None = None) -> None:
        """Make an observer.

        Args:
            sink: Takes the routed tokens, by ordinal of the MoE layer.
            pad_token_id: Tokens with this id do not count; None if batches have no padding, or
                say so through `padding_mask` (true where a token is padding).
        """
        self._sink = sink
        self._pad_token_id = pad_token_id
        self._token_id_T: torch.Tensor | None = None
        self._mask_T: torch.Tensor | None = None
        self._handles: list[Any] = []

    def attach(self, model: torch.nn.Module) -> None:
        """Install the hooks.

        Args:
            model: A `GPTModel`, bare or wrapped (`Float16Module`, `DistributedDataParallel`).

        Raises:
            ConfigError: The model has no MoE layer, or runs in a way that hooks cannot follow.
        """
        while hasattr(model, "module"):
            model = model.module
        layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        if not layers:
            raise ConfigError(
                explain(
                    "there is no MoE layer to observe", got=type(model).__name__, do="--num-experts"
                )
            )
        _check_hookable(model.config)
        self._handles += [
            model.register_forward_pre_hook(self._arm, with_kwargs=True),
            model.register_forward_hook(self._disarm, always_call=True),
        ]
        for ordinal, layer in enumerate(layers):
            self._handles.append(layer.router.register_forward_hook(self._router_hook(ordinal)))
        self._tensor_parallel = layers[0].attn_tp_group
        self._sequence_parallel = bool(model.config.sequence_parallel)
        self._top_k = int(model.config.moe_router_topk)
        self._drops = model.config.moe_expert_capacity_factor is not None

    def detach(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def _arm(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if input_ids is None:
            raise ConfigError(
                explain(
                    "the model was called without token ids, which the routing profile counts by",
                    where="semantic_ep.observe.output, --semantic-ep-observe-output",
                    do="Pass input_ids on every pipeline stage, or switch observation off",
                )
            )
        padding = kwargs.get("padding_mask")
        if padding is None and self._pad_token_id is not None:
            padding = input_ids == self._pad_token_id
        if not self._sequence_parallel and self._tensor_parallel.rank() > 0:
            return  # The same tokens as on the first rank of the group.
        self._token_id_T = self._as_routed(input_ids)
        self._mask_T = None if padding is None else ~self._as_routed(padding)

    def _disarm(self, *_: Any) -> None:
        self._token_id_T = self._mask_T = None

    def _as_routed(self, values_BS: torch.Tensor) -> torch.Tensor:
        """Bring [batch, sequence] into the order in which a router sees tokens: [T]."""
        values_SB = values_BS.detach().transpose(0, 1)
        if self._sequence_parallel:
            group = self._tensor_parallel
            values_SB = values_SB.chunk(group.size(), dim=0)[group.rank()]
        return values_SB.reshape(-1)

    def _router_hook(self, ordinal: int) -> Any:
        def on_route(_module: Any, _args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            if self._token_id_T is None:
                return
            routing_map = output[1].detach()
            if len(routing_map) != len(self._token_id_T):
                raise BackendError(
                    explain(
                        "the router saw other tokens than the model was given",
                        got=f"{len(routing_map)} routed, {len(self._token_id_T)} given",
                        do="Switch --semantic-ep-observe-output off for this way of running, and "
                        "report it",
                    )
                )
            self._sink.record(
                ordinal,
                self._chosen(routing_map),
                token_id_T=self._token_id_T,
                mask_T=self._mask_T,
            )

        return on_route

    def _chosen(self, routing_map_TE: torch.Tensor) -> torch.Tensor:
        """[T, K] experts of each token; -1 for activations that a capacity limit dropped."""
        held, expert_TK = routing_map_TE.to(torch.uint8).topk(self._top_k, dim=1)
        return expert_TK.masked_fill(held == 0, -1) if self._drops else expert_TK


def _check_hookable(config: Any) -> None:
    """Refuse to observe where Python hooks would not see every token exactly once."""
    obstacles = {
        "--cuda-graph-impl": getattr(config, "cuda_graph_impl", "none") not in (None, "none"),
        "--enable-cuda-graph": getattr(config, "enable_cuda_graph", False),
        "--external-cuda-graph": getattr(config, "external_cuda_graph", False),
        "--overlap-moe-expert-parallel-comm": getattr(
            config, "overlap_moe_expert_parallel_comm", False
        ),
        "--mtp-num-layers": getattr(config, "mtp_num_layers", None),
        "--pipeline-model-parallel-size": config.pipeline_model_parallel_size > 1,
    }
    for flag, present in obstacles.items():
        if present:
            raise ConfigError(
                explain(
                    "the routing of this model cannot be observed exactly with this setting",
                    where=flag,
                    do=f"Unset {flag}, or unset --semantic-ep-observe-output",
                )
            )
