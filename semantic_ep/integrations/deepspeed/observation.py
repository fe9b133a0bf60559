"""Watch the routers of a DeepSpeed engine and keep a routing profile beside its checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.config.sections import ObserveConfig
from semantic_ep.errors import ConfigError, explain
from semantic_ep.integrations.expert_parallel import SemanticExperts
from semantic_ep.integrations.observation import (
    RoutingObservation,
    experts_of_map,
    group_on_host,
    sequence_numbers,
)
from semantic_ep.integrations.transformers import MoELayerSite, find_moe_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObservedRouter:
    """One router of the model.

    Attributes:
        module: Its output, given to `experts`, is what `RoutingSink.record` takes.
        gate: Its output is the [T, E] logits, or has them first; None where no module has them.
        weight: [E, D] parameter that identifies it.
        num_experts: Logical experts (E).
        top_k: Experts a token activates (K).
        experts: Output of `module` -> [T, K] logical experts, -1 for a dropped activation.
    """

    module: nn.Module
    gate: nn.Module | None
    weight: nn.Parameter
    num_experts: int
    top_k: int
    experts: Callable[[Any], Tensor]


def find_routers(model: nn.Module) -> list[ObservedRouter]:
    """Routers of placed experts, of AutoEP and of native `deepspeed.moe` layers, in module order.

    Raises:
        ConfigError: There is none, or one routes in a way that cannot be read.
    """
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.moe.layer import MoE

    if any(isinstance(module, SemanticExperts) for module in model.modules()):
        return [_of_site(model, site) for site in find_moe_layers(model)]
    routers = []
    for name, module in model.named_modules():
        if isinstance(module, AutoEPMoELayer):
            routers.append(
                ObservedRouter(
                    module=module.router,
                    gate=module.router.gate,
                    weight=module.router.gate.weight,
                    num_experts=module.num_experts,
                    top_k=module.top_k,
                    experts=lambda output: output[1],
                )
            )
        elif isinstance(module, MoE):
            if module.deepspeed_moe.use_tutel:
                raise ConfigError(
                    explain(
                        f"{name} routes through Tutel, which does not tell the experts of a token",
                        do="Build the layer with use_tutel=False, or switch observation off",
                    )
                )
            gate = module.deepspeed_moe.gate
            routers.append(
                ObservedRouter(
                    module=gate,
                    gate=None,
                    weight=gate.wg.weight,
                    num_experts=module.num_experts,
                    top_k=gate.k,
                    experts=lambda output, k=gate.k: _native_experts(output, k),
                )
            )
    if not routers:
        raise ConfigError(
            explain(
                "the model has no MoE layer that DeepSpeed runs",
                where="semantic_ep.observe.output",
                got=type(model).__name__,
                do='Switch AutoEP on ("expert_parallel": {"enabled": true, ...}), or observation '
                "off",
            )
        )
    return routers


def _of_site(model: nn.Module, site: MoELayerSite) -> ObservedRouter:
    router = model.get_submodule(site.router)
    return ObservedRouter(
        module=router,
        gate=router,
        weight=router.weight,
        num_experts=site.num_experts,
        top_k=site.top_k,
        experts=lambda output: output[2],
    )


class EngineObservation(RoutingObservation):
    """Observes the routers of one DeepSpeed engine."""

    framework = "deepspeed"

    def __init__(
        self,
        engine: Any,
        config: ObserveConfig,
        *,
        fingerprint: ModelFingerprint,
        vocab_size: int,
    ) -> None:
        """Attach to an engine; collective over all ranks.

        Args:
            engine: A DeepSpeed engine whose MoE layers are in place.
            config: `output` must name a directory.
            fingerprint: The model; the hash of its routers is taken anew at each save.
            vocab_size: Token ids (V).

        Raises:
            ConfigError: The engine runs in a way in which tokens would not be counted right.
        """
        self._routers = find_routers(engine.module)
        _check_shape(self._routers, fingerprint)
        group, counts_here = _data_parallel_group(engine)
        super().__init__(
            config,
            fingerprint=fingerprint,
            vocab_size=vocab_size,
            group=group,
            seed=dist.get_rank(),
        )
        if counts_here:
            self._attach(engine.module)

    def router_weights(self) -> list[Tensor]:
        """See `RoutingObservation`; collective under ZeRO 3."""
        return [_whole(router.weight) for router in self._routers]

    def _attach(self, model: nn.Module) -> None:
        self._handles += [
            model.register_forward_pre_hook(self._begin_pass, with_kwargs=True),
            model.register_forward_hook(self._end_pass, always_call=True),
        ]
        for layer, router in enumerate(self._routers):
            self._handles.append(router.module.register_forward_hook(self._on_route(layer, router)))

    def _begin_pass(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        token_id_BS = _token_ids(args, kwargs)
        self.recorder.start_micro_batch(
            token_id_BS.reshape(-1),
            mask_T=_mask(kwargs.get("attention_mask"), token_id_BS),
            sequence_T=sequence_numbers(kwargs.get("position_ids"), token_id_BS).reshape(-1),
        )

    def _end_pass(self, *_: Any) -> None:
        self.recorder.ignore_pass()

    def _on_route(self, layer: int, router: ObservedRouter) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self.recorder.record(layer, router.experts(output))

        return hook


def _native_experts(output: tuple[Any, ...], top_k: int) -> Tensor:
    """[T, K] experts from either output of `TopKGate`; -1 where capacity dropped the token."""
    if len(output) > 4:  # Sparse: (loss, capacity, experts, indices [K, T], locations, ...).
        return output[3].t()
    sent_TE = output[2].any(dim=2)  # Dense: (loss, weights, mask [T, E, capacity], counts).
    return experts_of_map(sent_TE, top_k)


def _token_ids(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    candidates = [kwargs.get("input_ids"), *args]
    for value in candidates:
        if isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point():
            return value
    raise ConfigError(
        explain(
            "the model was called without token ids, which the routing profile counts by",
            where="semantic_ep.observe.output",
            do="Pass input_ids [batch, sequence] by name or as the first argument, or switch "
            "observation off",
        )
    )


def _mask(attention_mask: Any, token_id_BS: Tensor) -> Tensor | None:
    if attention_mask is None:
        return None
    if isinstance(attention_mask, Tensor) and attention_mask.shape == token_id_BS.shape:
        return attention_mask.reshape(-1)
    raise ConfigError(
        explain(
            "this attention mask does not tell which tokens are padding",
            where="semantic_ep.observe.output",
            got=f"shape {tuple(attention_mask.shape)}"
            if isinstance(attention_mask, Tensor)
            else type(attention_mask).__name__,
            allowed=f"shape {tuple(token_id_BS.shape)}, as the token ids",
        )
    )


def _check_shape(routers: list[ObservedRouter], fingerprint: ModelFingerprint) -> None:
    found = {(router.num_experts, router.top_k) for router in routers}
    wanted = (fingerprint.num_experts, fingerprint.top_k)
    if found != {wanted} or len(routers) != fingerprint.num_layers:
        raise ConfigError(
            explain(
                "the MoE layers that DeepSpeed runs are not those of the model",
                where="semantic_ep.observe.output",
                got=f"{len(routers)} layers of (experts, top-k) {sorted(found)}",
                allowed=f"{fingerprint.num_layers} layers of {wanted}",
                do="Layers must agree in experts and top-k to be observed",
            )
        )


def _data_parallel_group(engine: Any) -> tuple[dist.ProcessGroup, bool]:
    """A gloo group of the ranks that see different tokens, and whether to count on this rank.

    Tensor-parallel ranks see the same tokens: only the data-parallel group of rank 0 counts.
    """
    from deepspeed.runtime.pipe.engine import PipelineEngine

    for obstacle, present in (
        ("pipeline parallelism", isinstance(engine, PipelineEngine)),
        ("sequence parallelism", getattr(engine, "sequence_parallel_size", 1) > 1),
    ):
        if present:
            raise ConfigError(
                explain(
                    f"routing cannot be observed exactly under DeepSpeed's {obstacle}",
                    where="semantic_ep.observe.output",
                    do="Remove it, or set semantic_ep.enabled to false",
                )
            )
    ranks = dist.get_process_group_ranks(engine.data_parallel_group)
    return group_on_host(ranks), 0 in ranks


def _whole(parameter: nn.Parameter) -> Tensor:
    """The parameter's full value, gathered if ZeRO 3 has it in pieces."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().clone()
