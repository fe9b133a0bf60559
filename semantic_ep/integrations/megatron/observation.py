"""Watch the routers of a Megatron model and keep a routing profile beside its checkpoints.

Each training token counts once: a micro-batch is open while the model's own `forward` runs in
training mode with gradients, so that neither evaluation nor the recomputation of activations, which
runs in the backward pass, is counted.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn
from torch import distributed as dist

from semantic_ep.artifacts import ModelFingerprint, hash_arrays
from semantic_ep.config import ObserveConfig
from semantic_ep.errors import ConfigError, explain
from semantic_ep.observe.counters import CounterLimits
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.recorder import RoutingRecorder

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

logger = logging.getLogger(__name__)

PROFILE_IN_CHECKPOINT = "routing_profile"


class RoutingObservation:
    """The recorder of one model, its hooks, and where its profile goes.

    The forward pass must get its token ids as `input_ids`, [batch, sequence], already cut to this
    context-parallel rank, as Megatron's own batches are. Of tensor-parallel ranks that see the same
    tokens the first one counts; with sequence parallelism each counts its part of every sequence.
    """

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
        self._config, self._fingerprint = config, fingerprint
        self._pad_token_id = pad_token_id
        self._tensor_parallel = self._layers[0].attn_tp_group
        self._sequence_parallel = bool(model.config.sequence_parallel)
        self._top_k = int(model.config.moe_router_topk)
        self._drops = model.config.moe_expert_capacity_factor is not None
        self._shape_BS: tuple[int, int] | None = None
        # Profiles are combined on the host, which NCCL cannot do.
        self._group = dist.new_group(backend="gloo")
        halflife = config.halflife_steps
        self.recorder = RoutingRecorder(
            num_layers=fingerprint.num_layers,
            num_experts=fingerprint.num_experts,
            top_k=fingerprint.top_k,
            vocab_size=vocab_size,
            halflife_steps=None if halflife == "auto" else halflife,
            limits=CounterLimits(sample_tokens=config.sample_tokens),
            seed=dist.get_rank(),
        )
        self._handles: list[RemovableHandle] = []
        if self._sequence_parallel or self._tensor_parallel.rank() == 0:
            self._attach(model)

    def step(self) -> None:
        """The optimizer has stepped."""
        self.recorder.step()

    def fingerprint(self) -> ModelFingerprint:
        """The model with its routers as they are now."""
        weights = [layer.router.weight.detach().float().cpu().numpy() for layer in self._layers]
        return dataclasses.replace(self._fingerprint, router_sha256=hash_arrays(weights))

    def save(self, checkpoint: str | os.PathLike[str] | None = None) -> RoutingProfile | None:
        """Write the profile of all ranks; collective.

        Args:
            checkpoint: Directory of a checkpoint that gets a copy, to resume from.

        Returns:
            The profile on the rank that wrote it, None on the others.
        """
        fingerprint = self.fingerprint()
        profile = self.recorder.profile(
            fingerprint,
            group=self._group,
            min_count=self._config.min_count,
            meta={"framework": "megatron-core", "ranks": dist.get_world_size()},
        )
        trace = None
        if self._config.sample_tokens:
            trace = self.recorder.trace(fingerprint, group=self._group)
        if profile is None:
            return None
        output = Path(self._config.output)
        profile.save(output)
        if checkpoint is not None:
            profile.save(Path(checkpoint) / PROFILE_IN_CHECKPOINT)
        if trace is not None:
            trace.save(output.with_name(f"{output.name}-sample"))
        logger.info("routing profile of %.0f tokens in %s", profile.tokens, output)
        return profile

    def restore(self, checkpoint: str | os.PathLike[str]) -> None:
        """Go on from the profile in a checkpoint, if it has one. Rank 0 holds the old counts."""
        saved = Path(checkpoint) / PROFILE_IN_CHECKPOINT
        if dist.get_rank() == 0 and saved.exists():
            self.recorder.counters.restore(RoutingProfile.read(saved))

    def detach(self) -> None:
        """Remove all hooks."""
        while self._handles:
            self._handles.pop().remove()

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
        sequence_BS = _sequences(kwargs.get("position_ids"), token_id_BS)
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
            expert_TK = self._chosen(output[1].detach())
            rows, length = self._shape_BS
            if len(expert_TK) == rows * length:
                # Routers see sequences side by side: token t of every row, then token t + 1.
                expert_TK = expert_TK.view(length, rows, -1).transpose(0, 1).flatten(0, 1)
            self.recorder.record(ordinal, expert_TK)

        return hook

    def _chosen(self, routing_map_TE: Tensor) -> Tensor:
        """[T, K] experts of each token; -1 for activations that a capacity limit dropped."""
        held, expert_TK = routing_map_TE.to(torch.uint8).topk(self._top_k, dim=1)
        return expert_TK.masked_fill(held == 0, -1) if self._drops else expert_TK


def _sequences(position_ids: Any, token_id_BS: Tensor) -> Tensor:
    """[B, S] number of each token's sequence: rows, cut where positions start again."""
    starts_BS = torch.zeros_like(token_id_BS, dtype=torch.int32)
    starts_BS[:, 0] = 1
    if isinstance(position_ids, Tensor) and position_ids.shape == token_id_BS.shape:
        starts_BS |= (position_ids == 0).to(torch.int32)
    return starts_BS.reshape(-1).cumsum(0, dtype=torch.int32).view_as(token_id_BS)


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
