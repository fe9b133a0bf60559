"""Watch the routers of a Megatron model and keep a routing profile beside its checkpoints.

Each training token counts once: a micro-batch is open while the model's own `forward` runs in
training mode with gradients, so that neither evaluation nor the recomputation of activations, which
runs in the backward pass, is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn
from torch import distributed as dist

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.config import ObserveConfig
from semantic_ep.errors import ConfigError, explain
from semantic_ep.integrations.observation import (
    RoutingObservation,
    experts_of_map,
    sequence_numbers,
)


class ModelObservation(RoutingObservation):
    """Observes the routers of one Megatron model.

    The forward pass must get its token ids as `input_ids`, [batch, sequence], already cut to this
    context-parallel rank, as Megatron's own batches are. Of tensor-parallel ranks that see the same
    tokens the first one counts; with sequence parallelism each counts its part of every sequence.
    """

    framework = "megatron-core"

    def __init__(
        self,
        model: nn.Module,
        config: ObserveConfig,
        *,
        fingerprint: ModelFingerprint,
        vocab_size: int,
        pad_token_id: int | None = None,
    ) -> None:
        """Attach to a model; collective over all ranks.

        Args:
            model: A `GPTModel`, bare or wrapped (`Float16Module`, `DistributedDataParallel`).
            config: `output` must name a directory.
            fingerprint: The model; the hash of its routers is taken anew at each save.
            vocab_size: Token ids (V).
            pad_token_id: Tokens with this id do not count; None if batches have no padding, or
                say so through `padding_mask` (true where a token is padding).

        Raises:
            ConfigError: The model has no MoE layer, or runs in a way that hooks cannot follow.
        """
        while hasattr(model, "module"):
            model = model.module
        self._layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        _check_hookable(model.config, self._layers)
        super().__init__(
            config,
            fingerprint=fingerprint,
            vocab_size=vocab_size,
            group=dist.new_group(backend="gloo"),
        )
        self._pad_token_id = pad_token_id
        self._tensor_parallel = self._layers[0].attn_tp_group
        self._sequence_parallel = bool(model.config.sequence_parallel)
        self._top_k = int(model.config.moe_router_topk)
        self._shape_BS: tuple[int, int] | None = None
        if self._sequence_parallel or self._tensor_parallel.rank() == 0:
            self._attach(model)

    def router_weights(self) -> list[Tensor]:
        """See `RoutingObservation`."""
        return [layer.router.weight for layer in self._layers]

    def _attach(self, model: nn.Module) -> None:
        self._handles += [
            model.register_forward_pre_hook(self._begin_pass, with_kwargs=True),
            model.register_forward_hook(self._end_pass, always_call=True),
        ]
        for ordinal, layer in enumerate(self._layers):
            self._handles.append(layer.router.register_forward_hook(self._on_route(ordinal)))

    def _begin_pass(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        token_id_BS = kwargs.get("input_ids", args[0] if args else None)
        if token_id_BS is None:
            raise ConfigError(
                explain(
                    "the model was called without token ids, which the routing profile counts by",
                    where="semantic_ep.observe.output, --semantic-ep-observe-output",
                    do="Pass input_ids, or switch observation off",
                )
            )
        padding_BS = kwargs.get("padding_mask")
        if padding_BS is None and self._pad_token_id is not None:
            padding_BS = token_id_BS == self._pad_token_id
        sequence_BS = sequence_numbers(kwargs.get("position_ids"), token_id_BS)
        token_id_BS = self._local(token_id_BS)
        self._shape_BS = tuple(token_id_BS.shape)
        self.recorder.start_micro_batch(
            token_id_BS.reshape(-1),
            mask_T=None if padding_BS is None else ~self._local(padding_BS).reshape(-1),
            sequence_T=self._local(sequence_BS).reshape(-1),
        )

    def _end_pass(self, *_: Any) -> None:
        self._shape_BS = None
        self.recorder.ignore_pass()

    def _local(self, values_BS: Tensor) -> Tensor:
        """The part of each sequence that the routers of this rank see."""
        if not self._sequence_parallel:
            return values_BS
        group = self._tensor_parallel
        return values_BS.chunk(group.size(), dim=1)[group.rank()]

    def _on_route(self, ordinal: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: tuple[Tensor, Tensor]) -> None:
            if self._shape_BS is None:
                return
            expert_TK = experts_of_map(output[1].detach(), self._top_k)
            rows, length = self._shape_BS
            if len(expert_TK) == rows * length:
                # Routers see sequences side by side: token t of every row, then token t + 1.
                expert_TK = expert_TK.view(length, rows, -1).transpose(0, 1).flatten(0, 1)
            self.recorder.record(ordinal, expert_TK)

        return hook


def _check_hookable(config: Any, layers: list[MoELayer]) -> None:
    """Refuse to observe where Python hooks would not see every token exactly once."""
    if not layers:
        raise ConfigError(
            explain("there is no MoE layer to observe", where="--num-experts", do="Set it")
        )
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
