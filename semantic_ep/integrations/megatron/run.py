"""What a Megatron training run asks of this package: a placement and a routing profile."""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.config import SemanticEPConfig
from semantic_ep.errors import ConfigError, explain
from semantic_ep.integrations.megatron.dispatcher import Exchange
from semantic_ep.integrations.megatron.gradients import FinalizeWithCopies
from semantic_ep.integrations.megatron.groups import SemanticExpertGroup
from semantic_ep.integrations.megatron.layer import PlacedLayers
from semantic_ep.integrations.megatron.observation import ModelObservation
from semantic_ep.integrations.megatron.replanning import ModelPlacement
from semantic_ep.integrations.megatron.specs import place_experts
from semantic_ep.integrations.replanning import Replanning, check_settings
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.plan import Plan
from semantic_ep.runtime.groups import topology_of_job

ARCHITECTURE = "megatron_gpt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SemanticRun:
    """The `--semantic-ep-…` settings of one run, checked against its model.

    Attributes:
        config: The settings.
        fingerprint: The model, its router weights unknown.
        vocab_size: Token ids of the tokenizer (V).
        placed: Experts of the slots of every MoE layer, or None without a plan.
        groups: Expert-parallel groups by `semantic_ep.groups.scope`, or None where that is not
            set and Megatron's own are used.
        exchange: What sends the tokens, or None where Megatron's dispatcher does.
        contiguous: Experts in their own order, for our exchange without a plan; else None.
    """

    config: SemanticEPConfig
    fingerprint: ModelFingerprint
    vocab_size: int
    placed: PlacedLayers | None
    groups: SemanticExpertGroup | None
    exchange: Exchange | None = None
    contiguous: PlacedLayers | None = None

    @classmethod
    def prepare(
        cls,
        config: SemanticEPConfig,
        model: TransformerConfig,
        *,
        vocab_size: int,
        tokenizer_sha256: str = "",
        timeout: datetime.timedelta | None = None,
    ) -> Self:
        """Read the plan, if one is set, check that it is for this model, and form groups.

        Collective where `semantic_ep.groups.scope` is set or the plan has copies of experts;
        Megatron's own groups must exist.

        Args:
            config: `SemanticEPConfig.resolve(args=...)` of the parsed command line.
            model: Megatron's configuration of the model.
            vocab_size: Token ids of the tokenizer, without padding (V).
            tokenizer_sha256: Hash of tokenizer.json, "" when unknown.
            timeout: Of the collectives of new groups.

        Raises:
            ConfigError: A setting contradicts Megatron's own, or groups cannot be formed.
            ArtifactError: The plan cannot be read, or belongs to another model.
        """
        check_settings(config)
        _check_settings(config, model)
        fingerprint = ModelFingerprint(
            architecture=ARCHITECTURE,
            layer_ids=moe_layer_ids(model),
            num_experts=model.num_moe_experts or 0,
            top_k=model.moe_router_topk,
            tokenizer_sha256=tokenizer_sha256,
        )
        placed = None
        if config.enabled and config.plan.artifact != "auto":
            plan = Plan.read(config.plan.artifact)
            fingerprint.check(plan.fingerprint, what=f"the plan {config.plan.artifact}")
            copied = plan.placement.has_replicas
            placed = PlacedLayers(
                placement=plan.placement,
                layer_ids=fingerprint.layer_ids,
                topology=topology_of_job() if copied else None,
            )
        exchange = contiguous = None
        if config.enabled and config.dispatch.backend != "auto":
            exchange = Exchange(config.dispatch.backend, num_layers=len(fingerprint.layer_ids))
            if placed is None:
                placement = Placement.contiguous(
                    num_layers=len(fingerprint.layer_ids),
                    num_experts=fingerprint.num_experts,
                    ep_size=model.expert_model_parallel_size,
                )
                contiguous = PlacedLayers(placement=placement, layer_ids=fingerprint.layer_ids)
        groups = None
        if config.enabled and "scope" in config.groups.model_fields_set:
            groups = SemanticExpertGroup.create(config.groups.scope, timeout=timeout)
        return cls(
            config=config,
            fingerprint=fingerprint,
            vocab_size=vocab_size,
            placed=placed,
            groups=groups,
            exchange=exchange,
            contiguous=contiguous,
        )

    @property
    def pg_collection(self) -> ProcessGroupCollection | None:
        """For `GPTModel` and `DistributedDataParallel`; None where Megatron's own are used."""
        return None if self.groups is None else self.groups.collection

    @functools.cached_property
    def finalize_model_grads(self) -> Callable[..., None]:
        """For `config.finalize_model_grads_func`: Megatron's own, or it and the sum over copies."""
        copied = self.placed is not None and self.placed.placement.has_replicas
        return FinalizeWithCopies() if copied else finalize_model_grads

    def seed(self, seed: int) -> None:
        """Seed Megatron's random states, as `model_parallel_cuda_manual_seed` does."""
        if self.groups is None:
            model_parallel_cuda_manual_seed(seed)
        else:
            self.groups.seed(seed)

    def place(self, spec: Any, *, pg_collection: ProcessGroupCollection | None = None) -> Any:
        """The layer or block spec with placed experts and our exchange; the same without both.

        Args:
            spec: See `place_experts`.
            pg_collection: Groups of the model, where they are neither Megatron's nor this run's.
        """
        layers = self.placed or self.contiguous
        if layers is None:
            return spec
        return place_experts(
            spec,
            layers,
            pg_collection=pg_collection or self.pg_collection,
            exchange=self.exchange,
        )

    def optimizer(self, config: OptimizerConfig, model_chunks: Sequence[nn.Module]) -> Any:
        """Megatron's optimizer over the groups of this run, as `get_megatron_optimizer` makes it.

        Raises:
            ConfigError: A module was built with other groups than `pg_collection`.
        """
        if self.groups is None:
            return get_megatron_optimizer(config, list(model_chunks))
        return self.groups.optimizer(config, model_chunks)

    def observe(
        self, model: nn.Module | Sequence[nn.Module], *, pad_token_id: int | None = None
    ) -> ModelObservation | None:
        """Attach to the built model; None where nothing is to be recorded. Collective.

        Args:
            model: See `ModelObservation`.
            pad_token_id: See `ModelObservation`.

        Raises:
            ConfigError: The model was built with other groups than `pg_collection`.
        """
        if self.groups is not None:
            for part in [model] if isinstance(model, nn.Module) else model:
                self.groups.check_model(part)
        if not self.config.enabled or self.config.observe.output == "auto":
            return None
        return ModelObservation(
            model,
            self.config.observe,
            fingerprint=self.fingerprint,
            vocab_size=self.vocab_size,
            pad_token_id=pad_token_id,
        )

    def replan(
        self,
        model: nn.Module | Sequence[nn.Module],
        optimizer: Any,
        observation: ModelObservation | None,
    ) -> Replanning | None:
        """What reports drift and, if an interval is set, moves experts; collective.

        None without a plan, or where nothing is observed. The training loop calls its `step` after
        each step of the optimizer, its `at_checkpoint` with what `observation.save` returned, and
        its `resume` with what `observation.restore` returned.

        Args:
            model: Built from the spec that `place` returned, bare or wrapped; see `ModelPlacement`.
            optimizer: Of `get_megatron_optimizer`.
            observation: What `observe` returned.

        Raises:
            ConfigError: An interval is set, and the experts of this run cannot move.
        """
        if observation is None or self.placed is None:
            return None
        movable = None
        if self.config.replan.interval != "auto":
            movable = ModelPlacement(model, optimizer)
        return Replanning(self.config, observation, movable)


def moe_layer_ids(model: TransformerConfig) -> tuple[int, ...]:
    """Model layer indices, from 0, of the MoE layers, as `moe_layer_freq` says."""
    if not model.num_moe_experts:
        return ()
    frequency = model.moe_layer_freq
    if isinstance(frequency, int):
        return tuple(range(0, model.num_layers, frequency))
    return tuple(layer for layer, is_moe in enumerate(frequency) if is_moe)


def _check_settings(config: SemanticEPConfig, model: TransformerConfig) -> None:
    mistakes = []
    if config.enabled and not model.num_moe_experts:
        mistakes.append(
            explain("the model has no experts", where="semantic_ep.enabled", do="Set --num-experts")
        )
    if config.groups.ep_size not in ("auto", model.expert_model_parallel_size):
        mistakes.append(
            explain(
                "contradicts --expert-model-parallel-size",
                where="semantic_ep.groups.ep_size, --semantic-ep-groups-ep-size",
                got=config.groups.ep_size,
                allowed=f'{model.expert_model_parallel_size} or "auto"',
            )
        )
    if mistakes:
        raise ConfigError("\n".join(mistakes))
