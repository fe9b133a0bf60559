"""Move the experts of a running Megatron model, with their optimizer state, between ranks.

Experts stay in their layer, so that with pipeline stages each exchanges those of its own layers
within its expert-parallel groups. Whether they move is one decision over all layers, and all ranks
of all stages change together or not at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
)
from torch import Tensor, nn
from torch import distributed as dist

from semantic_ep.errors import ConfigError, PlacementError, explain
from semantic_ep.integrations.expert_state import (
    ExpertState,
    Piece,
    agreed_kinds,
    expert_bytes,
    whole_states,
)
from semantic_ep.integrations.megatron.copies import count_once, rows_of
from semantic_ep.integrations.megatron.layer import PlacedLayers, SemanticMoELayer
from semantic_ep.integrations.megatron.observation import bare_model
from semantic_ep.plan.placement import Placement
from semantic_ep.runtime.collectives import from_all_ranks
from semantic_ep.runtime.exchange import Exchanged, exchange_experts
from semantic_ep.runtime.groups import topology_of_job

WHERE = "semantic_ep.replan.interval, --semantic-ep-replan-interval"
_Prepared = TypeVar("_Prepared")


class ModelPlacement:
    """The placed experts of a model and its optimizer; a `PlacedModel`."""

    def __init__(self, model: nn.Module | Sequence[nn.Module], optimizer: Any) -> None:
        """Check that the experts can move; collective over all ranks.

        Args:
            model: Built from a spec that `place_experts` made, bare or wrapped; all parts of it
                that this rank runs with interleaved stages.
            optimizer: Of `get_megatron_optimizer`.

        Raises:
            ConfigError: They cannot.
        """
        parts = [model] if isinstance(model, nn.Module) else list(model)
        # None on a pipeline stage of dense layers.
        self._layers = [
            module
            for part in parts
            for module in part.modules()
            if isinstance(module, SemanticMoELayer)
        ]
        self._optimizers = _unchained(optimizer)
        placed = self._layers[0].placed if self._layers else None
        self._placed = next(filter(None, _everyone(placed)), None)
        _check(parts, self._placed, self._optimizers)
        whole = bare_model(parts[0])
        self._ep_group = self._layers[0].ep_group if self._layers else whole.pg_collection.ep
        self.row_bytes = whole.config.hidden_size * whole.config.params_dtype.itemsize
        # Every rank describes the group of rank 0.
        first = _everyone(dist.get_process_group_ranks(self._ep_group))[0]
        self.topology = topology_of_job().of_ranks(first)

    @property
    def placement(self) -> Placement:
        """See `PlacedModel`."""
        return self._placed.placement

    @property
    def sources(self) -> Placement:
        """See `PlacedModel`: every copy of an expert takes the same steps."""
        return self.placement

    def expert_bytes(self) -> int:
        """See `PlacedModel`."""
        rows = [rows_of(layer.experts, where=WHERE) for layer in self._layers[:1]]
        kinds = agreed_kinds(
            [self._pieces(each) for layer in self._layers for each in layer.experts.parameters()]
        )
        return max(_everyone(sum(expert_bytes(list(layer.values()), kinds) for layer in rows)))

    def move(self, placement: Placement) -> Exchanged:
        """See `PlacedModel`."""
        rows = [rows_of(layer.experts, where=WHERE) for layer in self._layers]
        pieces = _prepared_by_all(
            lambda: [
                {name: [self._pieces(each) for each in slots] for name, slots in layer.items()}
                for layer in rows
            ]
        )
        kinds = agreed_kinds([p for layer in pieces for each in layer.values() for p in each])
        state = ExpertState(len(rows), kinds, self._shards())

        def add_all() -> None:
            for number, layer in enumerate(rows):
                for name, of_slots in layer.items():
                    state.add(number, name, of_slots, pieces[number][name])

        _prepared_by_all(add_all)
        layer_ids = self._placed.layer_ids
        exchanged = exchange_experts(
            state.rows,
            old=self.placement,
            new=placement,
            group=self._ep_group,
            together=dist.group.WORLD,
            layers=[layer_ids.index(layer.layer_number - 1) for layer in self._layers],
        )
        state.store()
        self._placed = dataclasses.replace(self._placed, placement=placement)
        for layer, of_layer in zip(self._layers, rows, strict=True):
            layer.take_placement(self._placed)
            if placement.has_replicas:
                count_once(
                    of_layer,
                    placement=placement,
                    layer=self._placed.row_of(layer.layer_number),
                    ep_rank=self._ep_group.rank(),
                    stand_ins=self._trained,
                )
        return exchanged

    def _shards(self) -> dist.ProcessGroup | None:
        """Ranks that divide the optimizer state of the same experts."""
        if not self._layers:
            return None
        expert = next(self._layers[0].experts.parameters())
        for optimizer in self._optimizers:
            if isinstance(optimizer, DistributedOptimizer) and any(
                expert in buffer.param_index_map for buffer in optimizer.buffers
            ):
                return optimizer.data_parallel_group
        return None

    def _pieces(self, parameter: nn.Parameter) -> dict[str, Piece]:
        for optimizer in self._optimizers:
            if _trains(optimizer, parameter):
                divided = isinstance(optimizer, DistributedOptimizer)
                return (_divided_pieces if divided else _plain_pieces)(optimizer, parameter)
        return {}  # Not trained, or another rank's.

    def _trained(self, parameter: nn.Parameter) -> list[Tensor]:
        """What optimizers train in the place of a parameter."""
        return [_main(each, parameter) for each in self._optimizers if _trains(each, parameter)]


def _everyone(mine: Any) -> list[Any]:
    """What every rank passed, in their order; collective over all ranks."""
    return from_all_ranks(mine, "agreement on the move of experts")


def _prepared_by_all(prepare: Callable[[], _Prepared]) -> _Prepared:
    """What this rank prepares, if all of them can; collective over all ranks.

    Raises:
        PlacementError: One of them cannot. None waits for another in what would follow.
    """
    problem, prepared = None, None
    try:
        prepared = prepare()
    except PlacementError as error:
        problem = str(error)
    problems = [found for found in _everyone(problem) if found is not None]
    if problems:
        raise PlacementError(problems[0])
    return prepared


def _trains(optimizer: Any, parameter: nn.Parameter) -> bool:
    if isinstance(optimizer, DistributedOptimizer):
        return parameter in optimizer.model_param_group_index_map
    main = _main(optimizer, parameter)
    return any(main is each for group in optimizer.param_groups for each in group["params"])


def _main(optimizer: Any, parameter: nn.Parameter) -> Tensor:
    """What an optimizer trains for a parameter: itself, its master weights or a part of either."""
    if not isinstance(optimizer, DistributedOptimizer):
        main: Tensor = getattr(parameter, "main_param", parameter)
        return main
    group, order = optimizer.model_param_group_index_map[parameter]
    part: Tensor = optimizer.optimizer.param_groups[group]["params"][order]
    return part


def _plain_pieces(optimizer: Any, parameter: nn.Parameter) -> dict[str, Piece]:
    """State of an optimizer that has it whole, with master weights where it keeps some."""
    main = _main(optimizer, parameter)
    found = whole_states(optimizer.optimizer.state.get(main, {}), parameter.shape)
    if main is not parameter:
        found["param"] = Piece(values=main.detach().view(-1))
    return found


def _divided_pieces(optimizer: DistributedOptimizer, parameter: nn.Parameter) -> dict[str, Piece]:
    """What the distributed optimizer has of a parameter on this rank."""
    main = _main(optimizer, parameter)
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


def _check(
    parts: Sequence[nn.Module], placed: PlacedLayers | None, optimizers: Sequence[Any]
) -> None:
    if placed is None:
        raise ConfigError(
            explain(
                "the model has no placed experts",
                where=WHERE,
                got=type(bare_model(parts[0])).__name__,
                do="Build it from the spec that SemanticRun.place returns, or unset it",
            )
        )
    for name, obstacle in _obstacles(parts, optimizers):
        if obstacle:
            raise ConfigError(
                explain(
                    "with this setting the experts of a running model cannot move",
                    where=WHERE,
                    got=name,
                    do=f"Drop {name}, or unset it and resume from a checkpoint under another plan",
                )
            )


def _obstacles(parts: Sequence[nn.Module], optimizers: Sequence[Any]) -> Iterator[tuple[str, bool]]:
    """Flags, or kinds of optimizer, and whether the run has them."""
    wrapper = getattr(parts[0], "ddp_config", None)
    yield "--fp8-format", bool(getattr(bare_model(parts[0]).config, "fp8", None))
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
