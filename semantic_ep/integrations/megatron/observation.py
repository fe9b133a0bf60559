"""Watch the routers of a Megatron model and keep a routing profile beside its checkpoints.

Each training token counts once: a micro-batch is open while the model's own `forward` runs in
training mode with gradients, so that neither evaluation nor the recomputation of activations, which
runs in the backward pass, is counted. Each rank counts what its own routers see. Sequence and
context parallelism give them different tokens; pipeline stages see the same tokens and count
different layers. With interleaved stages a rank runs several parts of the model, whose passes over
a micro-batch are put together at the end of the step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn
from torch import distributed as dist

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.config.sections import ObserveConfig
from semantic_ep.errors import ConfigError, explain
from semantic_ep.integrations.megatron.sequences import sequences_of_batch
from semantic_ep.integrations.observation import (
    RoutingObservation,
    experts_of_map,
    group_on_host,
)
from semantic_ep.integrations.stages import StageExchange, join_parts
from semantic_ep.observe.micro_batch import MicroBatch
from semantic_ep.runtime.collectives import from_all_ranks


class ModelObservation(RoutingObservation):
    """Observes the routers of one Megatron model.

    The forward pass must get its token ids as `input_ids`, [batch, sequence], already cut to this
    context-parallel rank, as Megatron's own batches are. Of pipeline stages only the first needs
    them, and `step` is collective over the stages. Of tensor-parallel ranks that see the same
    tokens the first one counts; with sequence parallelism each counts its part of every sequence.
    """

    framework = "megatron-core"

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        config: ObserveConfig,
        *,
        fingerprint: ModelFingerprint,
        vocab_size: int,
        pad_token_id: int | None = None,
    ) -> None:
        """Attach to a model; collective over all ranks.

        Args:
            model: A `GPTModel`, bare or wrapped (`Float16Module`, `DistributedDataParallel`);
                all parts of it that this rank runs, in order, with interleaved stages.
            config: `output` must name a directory.
            fingerprint: The model; the hash of its routers is taken anew at each save.
            vocab_size: Token ids (V).
            pad_token_id: Tokens with this id do not count; None if batches have no padding, or
                say so through `padding_mask` (true where a token is padding).

        Raises:
            ConfigError: The model has no MoE layer, or runs in a way that hooks cannot follow.
        """
        parts = [bare_model(part) for part in ([model] if isinstance(model, nn.Module) else model)]
        _check_hookable(parts)
        self._routers = _routers_by_layer(parts, fingerprint)
        self._layers = [_layers_in(part, self._routers) for part in parts]
        groups, settings = parts[0].pg_collection, parts[0].config
        self._tensor_parallel, self._context_parallel = groups.tp, groups.cp
        self._pipeline = dist.get_process_group_ranks(groups.pp)
        self._is_first_stage = groups.pp.rank() == 0
        self._sequence_parallel = bool(settings.sequence_parallel)
        self._pad_token_id, self._top_k = pad_token_id, fingerprint.top_k
        self._in_pass, self._graphed = False, _is_graphed(settings)
        # The part of the model that ran in each training pass of this step, for `_complete`.
        self._passes: list[int] = []
        self._stages: StageExchange | None = None
        share: dict[str, Any] = {"graph_safe": self._graphed}
        if len(self._pipeline) > 1:
            layers = tuple(self._routers)
            self._stages = StageExchange(group_on_host(self._pipeline), layers, top_k=self._top_k)
            share |= {
                "layers": layers,
                "counts_tokens": self._is_first_stage,
                "complete": self._complete,
                "join": functools.partial(
                    self._stages.join_samples, num_layers=fingerprint.num_layers
                ),
            }
        super().__init__(
            config,
            fingerprint=fingerprint,
            vocab_size=vocab_size,
            group=dist.new_group(backend="gloo"),
            seed=_first_rank_with_same_batch((groups.tp, groups.cp, groups.pp)),
            **share,
        )
        if self._sequence_parallel or self._tensor_parallel.rank() == 0:
            for number, part in enumerate(parts):
                self._attach(number, part)

    def router_weights(self) -> list[Tensor]:
        """See `RoutingObservation`; collective over the pipeline."""
        own = {layer: router.weight for layer, router in self._routers.items()}
        return list(own.values()) if self._stages is None else self._stages.weights(own)

    def goes_on_here(self) -> bool:
        """See `RoutingObservation`; each stage takes over its own layers."""
        return 0 in self._pipeline

    def _attach(self, number: int, part: nn.Module) -> None:
        def begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if model.training and torch.is_grad_enabled():
                if self._stages is not None:
                    self._passes.append(number)
                self._begin_pass(number, args, kwargs)

        self._handles += [
            part.register_forward_pre_hook(begin, with_kwargs=True),
            part.register_forward_hook(self._end_pass, always_call=True),
        ]
        for layer in self._layers[number]:
            hook = self._routers[layer].register_forward_hook(self._on_route(layer))
            self._handles.append(hook)

    def _complete(self, batches: list[MicroBatch]) -> list[MicroBatch]:
        assert self._stages is not None
        passes, self._passes = self._passes, []
        return self._stages.complete(join_parts(batches, passes))

    def _begin_pass(self, part: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._in_pass = True
        if part > 0 or not self._is_first_stage:
            self.recorder.start_micro_batch(layers=self._layers[part])
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
        sequence_BS = sequences_of_batch(
            token_id_BS,
            position_ids=kwargs.get("position_ids", args[1] if len(args) > 1 else None),
            packed_seq_params=kwargs.get("packed_seq_params"),
            context_parallel=self._context_parallel,
        )
        self.recorder.start_micro_batch(
            self._as_routed(token_id_BS),
            mask_T=None if padding_BS is None else ~self._as_routed(padding_BS),
            sequence_T=self._as_routed(sequence_BS),
            layers=self._layers[part],
        )

    def _end_pass(self, *_: Any) -> None:
        self._in_pass = False
        self.recorder.ignore_pass()

    def _as_routed(self, values_BS: Tensor) -> Tensor:
        """[T] values of the tokens that the routers of this rank see, in their order.

        They see sequences side by side: token t of every row, then token t + 1.
        """
        if self._sequence_parallel:
            group = self._tensor_parallel
            values_BS = values_BS.chunk(group.size(), dim=1)[group.rank()]
        return values_BS.t().reshape(-1)

    def _on_route(self, layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: tuple[Tensor, Tensor]) -> None:
            # A graph may be captured outside a pass, and keeps what is called then.
            if self._in_pass or self._graphed:
                self.recorder.record(layer, experts_of_map(output[1].detach(), self._top_k))

        return hook


def bare_model(model: nn.Module) -> nn.Module:
    """The model itself, without what it is wrapped in."""
    while hasattr(model, "module"):
        model = model.module
    return model


def _routers_by_layer(
    parts: Sequence[nn.Module], fingerprint: ModelFingerprint
) -> dict[int, nn.Module]:
    """Routers that this rank runs, by the index of their MoE layer in the whole model.

    Raises:
        ConfigError: They are not those of the fingerprint.
    """
    if not fingerprint.layer_ids:
        raise ConfigError(
            explain("there is no MoE layer to observe", where="--num-experts", do="Set it")
        )
    routers = {}
    for module in (module for part in parts for module in part.modules()):
        if not isinstance(module, MoELayer):
            continue
        layer = module.layer_number - 1  # Megatron numbers the layers of the whole model, from 1.
        if layer not in fingerprint.layer_ids:
            raise ConfigError(
                explain(
                    f"layer {layer} is an MoE layer, which the model's fingerprint does not know",
                    allowed=f"MoE layers {list(fingerprint.layer_ids)}",
                )
            )
        routers[fingerprint.layer_ids.index(layer)] = module.router
    return routers


def _layers_in(part: nn.Module, routers: dict[int, nn.Module]) -> tuple[int, ...]:
    own = set(part.modules())
    return tuple(layer for layer, router in routers.items() if router in own)


def _first_rank_with_same_batch(groups: Collection[dist.ProcessGroup]) -> int:
    """The first of the ranks that work on this rank's batch, in whatever way; collective."""
    neighbours = {rank for group in groups for rank in dist.get_process_group_ranks(group)}
    everyone = from_all_ranks(neighbours, "gathering of the ranks of a batch")
    reached: set[int] = set()
    left = {dist.get_rank()}
    while left:
        reached |= left
        left = set().union(*(everyone[rank] for rank in left)) - reached
    return min(reached)


def _is_graphed(config: Any) -> bool:
    return getattr(config, "cuda_graph_impl", "none") not in (None, "none")


def _graphs_whole_iteration(config: Any) -> bool:
    scopes = getattr(config, "cuda_graph_scope", None) or ()
    chosen = [scopes] if isinstance(scopes, str) else list(scopes)
    chosen.append(getattr(config, "cuda_graph_impl", "none"))
    return any(getattr(each, "name", each) == "full_iteration" for each in chosen)


def _check_hookable(parts: Sequence[nn.Module]) -> None:
    """Refuse to observe where Python hooks would not see every token exactly once."""
    config = parts[0].config
    obstacles = {
        "--cuda-graph-scope full_iteration": _graphs_whole_iteration(config),
        "--overlap-moe-expert-parallel-comm": getattr(
            config, "overlap_moe_expert_parallel_comm", False
        ),
        "--mtp-num-layers": getattr(config, "mtp_num_layers", None),
        # Ranks then hold other shares of each row than sequences are told apart by.
        "--hybrid-context-parallel": getattr(config, "hybrid_context_parallel", False),
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
    wanted = config.virtual_pipeline_model_parallel_size or 1
    if len(parts) != wanted:
        raise ConfigError(
            explain(
                "interleaved pipeline stages are observed together",
                where="--num-layers-per-virtual-pipeline-stage",
                got=f"{len(parts)} of the {wanted} parts of the model on this rank",
                do="Pass the list of all model chunks to observe()",
            )
        )
