"""Move the experts of a running Megatron model, with their optimizer state, between ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
)
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import distributed as dist
from torch import nn

from semantic_ep.errors import ConfigError, explain
from semantic_ep.integrations.expert_state import (
    ExpertState,
    Piece,
    agreed_kinds,
    expert_bytes,
    whole_states,
)
from semantic_ep.integrations.megatron.layer import PlacedLayers, SemanticMoELayer
from semantic_ep.plan.placement import Placement
from semantic_ep.runtime.exchange import Exchanged, exchange_experts
from semantic_ep.runtime.groups import topology_of_job

WHERE = "semantic_ep.replan.interval, --semantic-ep-replan-interval"
_NUMBERED = re.compile(r"(.*?)(\d+)")


class ModelPlacement:
    """The placed experts of a model and its optimizer; a `PlacedModel`."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        """Check that the experts can move; collective.

        Args:
            model: Built from a spec that `place_experts` made, bare or wrapped.
            optimizer: Of `get_megatron_optimizer`.

        Raises:
            ConfigError: They cannot.
        """
        self._layers = [m for m in model.modules() if isinstance(m, SemanticMoELayer)]
        self._optimizers = _unchained(optimizer)
        _check(model, self._layers, self._optimizers)
        config = self._layers[0].config
        self.row_bytes = config.hidden_size * config.params_dtype.itemsize
        ranks: list[Any] = [dist.get_process_group_ranks(self._layers[0].ep_group)]
        # Every rank describes the group of rank 0.
        dist.broadcast_object_list(ranks, src=0)
        self.topology = topology_of_job().of_ranks(ranks[0])

    @property
    def placement(self) -> Placement:
        """See `PlacedModel`."""
        return self._layers[0].placed.placement

    def expert_bytes(self) -> int:
        """See `PlacedModel`."""
        pieces = [self._pieces(p) for layer in self._layers for p in layer.experts.parameters()]
        return expert_bytes(list(rows_of(self._layers[0].experts).values()), agreed_kinds(pieces))

    def move(self, placement: Placement) -> Exchanged:
        """See `PlacedModel`."""
        rows = [rows_of(layer.experts) for layer in self._layers]
        pieces = [
            {name: [self._pieces(each) for each in of_slots] for name, of_slots in layer.items()}
            for layer in rows
        ]
        kinds = agreed_kinds([p for layer in pieces for each in layer.values() for p in each])
        state = ExpertState(len(rows), kinds, self._shards())
        for number, layer in enumerate(rows):
            for name, of_slots in layer.items():
                state.add(number, name, of_slots, pieces[number][name])
        exchanged = exchange_experts(
            state.rows,
            old=self.placement,
            new=placement,
            group=self._layers[0].ep_group,
            together=dist.group.WORLD,
        )
        state.store()
        placed = PlacedLayers(placement=placement, layer_ids=self._layers[0].placed.layer_ids)
        for layer in self._layers:
            layer.take_placement(placed)
        return exchanged

    def _shards(self) -> dist.ProcessGroup | None:
        """Ranks that divide the optimizer state of the same experts."""
        expert = next(self._layers[0].experts.parameters())
        for optimizer in self._optimizers:
            if isinstance(optimizer, DistributedOptimizer) and any(
                expert in buffer.param_index_map for buffer in optimizer.buffers
            ):
                return optimizer.data_parallel_group
        return None

    def _pieces(self, parameter: nn.Parameter) -> dict[str, Piece]:
        for optimizer in self._optimizers:
            if isinstance(optimizer, DistributedOptimizer):
                if parameter in optimizer.model_param_group_index_map:
                    return _divided_pieces(optimizer, parameter)
            elif _trains(optimizer, parameter):
                return _plain_pieces(optimizer, parameter)
        return {}  # Not trained, or another rank's.


def rows_of(experts: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters of a layer's experts by name, one a slot.

    Args:
        experts: `SequentialMLP`, with a module for each slot, or `TEGroupedMLP`, whose parameters
            end in the number of their slot.
    """
    if isinstance(experts, SequentialMLP):
        of_slot = [dict(expert.named_parameters()) for expert in experts.local_experts]
        return {name: [slot[name] for slot in of_slot] for name in of_slot[0]}
    rows: dict[str, dict[int, nn.Parameter]] = {}
    for name, parameter in experts.named_parameters():
        numbered = _NUMBERED.fullmatch(name)
        if numbered is not None:
            rows.setdefault(numbered[1], {})[int(numbered[2])] = parameter
    slots = range(experts.num_local_experts)
    found = {name: sorted(of_slots) for name, of_slots in rows.items()}
    if len(list(experts.parameters())) != len(rows) * len(slots) or any(
        numbers != list(slots) for numbers in found.values()
    ):
        raise ConfigError(
            explain(
                f"the parameters of {type(experts).__name__} do not say which slot they are of",
                where=WHERE,
                got=str([name for name, _ in experts.named_parameters()]),
                do="Build the experts with one parameter for each of them, or unset it",
            )
        )
    return {name: [of_slots[slot] for slot in slots] for name, of_slots in rows.items()}


def _trains(optimizer: Any, parameter: nn.Parameter) -> bool:
    main = getattr(parameter, "main_param", parameter)
    return any(main is each for group in optimizer.param_groups for each in group["params"])


def _plain_pieces(optimizer: Any, parameter: nn.Parameter) -> dict[str, Piece]:
    """State of an optimizer that has it whole, with master weights where it keeps some."""
    main = getattr(parameter, "main_param", parameter)
    found = whole_states(optimizer.optimizer.state.get(main, {}), parameter.shape)
    if main is not parameter:
        found["param"] = Piece(values=main.detach().view(-1))
    return found


def _divided_pieces(optimizer: DistributedOptimizer, parameter: nn.Parameter) -> dict[str, Piece]:
    """What the distributed optimizer has of a parameter on this rank."""
    group, order = optimizer.model_param_group_index_map[parameter]
    main = optimizer.optimizer.param_groups[group]["params"][order]
    found = whole_states(optimizer.optimizer.state.get(main, {}), main.shape)
    # Of parameters in float32 it trains the weights themselves, which move anyway.
    if main.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
        found["param"] = Piece(values=main.detach().view(-1))
    start = optimizer._get_model_param_range_map(parameter)["param"].start
    return {name: Piece(values=piece.values, start=start) for name, piece in found.items()}


def _unchained(optimizer: Any) -> list[Any]:
    if isinstance(optimizer, ChainedOptimizer):
        return [one for each in optimizer.chained_optimizers for one in _unchained(each)]
    return [optimizer]


def _check(model: nn.Module, layers: Sequence[SemanticMoELayer], optimizers: Sequence[Any]) -> None:
    if not layers:
        raise ConfigError(
            explain(
                "the model has no placed experts",
                where=WHERE,
                got=type(model).__name__,
                do="Build it from the spec that SemanticRun.place returns, or unset it",
            )
        )
    for name, obstacle in _obstacles(model, layers[0].config, optimizers):
        if obstacle:
            raise ConfigError(
                explain(
                    "with this setting the experts of a running model cannot move",
                    where=WHERE,
                    got=name,
                    do=f"Drop {name}, or unset it and resume from a checkpoint under another plan",
                )
            )


def _obstacles(
    model: nn.Module, config: Any, optimizers: Sequence[Any]
) -> Iterator[tuple[str, bool]]:
    """Flags, or kinds of optimizer, and whether the run has them."""
    wrapper = getattr(model, "ddp_config", None)
    yield "--pipeline-model-parallel-size", config.pipeline_model_parallel_size > 1
    yield "--fp8-format", bool(getattr(config, "fp8", None))
    yield "--overlap-param-gather", bool(getattr(wrapper, "overlap_param_gather", False))
    instances = getattr(wrapper, "num_distributed_optimizer_instances", 1)
    yield "--num-distributed-optimizer-instances", instances > 1
    for optimizer in optimizers:
        known = DistributedOptimizer | Float16OptimizerWithFloat16Params | FP32Optimizer
        yield type(optimizer).__name__, not isinstance(optimizer, known)
        settings = optimizer.config
        yield (
            "--use-precision-aware-optimizer",
            bool(getattr(settings, "use_precision_aware_optimizer", False)),
        )
        yield "--optimizer-cpu-offload", bool(getattr(settings, "optimizer_cpu_offload", False))
