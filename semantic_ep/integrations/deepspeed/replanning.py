"""Move the experts of a running DeepSpeed engine, with their optimizer state, between ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from semantic_ep.errors import ConfigError, explain
from semantic_ep.integrations.deepspeed.native import native_rows
from semantic_ep.integrations.deepspeed.observation import find_routers
from semantic_ep.integrations.deepspeed.optimizer_state import full_shape, obstacle_to_moving
from semantic_ep.integrations.deepspeed.placing import PlacedExperts
from semantic_ep.integrations.deepspeed.stored_state import MASTER
from semantic_ep.integrations.expert_state import (
    ExpertState,
    Piece,
    agreed_kinds,
    expert_bytes,
    is_trained,
    whole_states,
)
from semantic_ep.plan.placement import Placement
from semantic_ep.runtime.exchange import Exchanged, exchange_experts
from semantic_ep.topology import Topology


class EnginePlacement:
    """The placed experts of an engine; a `PlacedModel`."""

    def __init__(self, engine: Any) -> None:
        """Check that the experts can move.

        Args:
            engine: With `placed_experts`.

        Raises:
            ConfigError: Its optimizer keeps what cannot be divided by expert.
        """
        obstacle = obstacle_to_moving(engine)
        if obstacle is not None:
            problem, do = obstacle
            raise ConfigError(
                explain(
                    f"the optimizer state cannot move to another placement: {problem}",
                    where="semantic_ep.replan.interval, --semantic-ep-replan-interval",
                    do=f"{do}; or unset it",
                )
            )
        self._engine = engine

    @property
    def placement(self) -> Placement:
        """See `PlacedModel`."""
        return self._placed.placement

    @property
    def sources(self) -> Placement:
        """See `PlacedModel`: the optimizer trains the first copy of each expert alone."""
        return self.placement.first_copies

    @property
    def topology(self) -> Topology:
        """See `PlacedModel`."""
        groups = self._placed.groups
        job = Topology(node_of_rank=groups.node_of_rank)
        return job.of_ranks(groups.expert_parallel_group(0))

    @property
    def row_bytes(self) -> int:
        """See `PlacedModel`."""
        router = find_routers(self._engine.module)[0].weight
        return full_shape(router)[1] * router.element_size()

    def expert_bytes(self) -> int:
        """See `PlacedModel`."""
        rows = self._rows()
        trained = [each for of_layer in rows for each in of_layer.values() if is_trained(each)]
        kinds = agreed_kinds([of_one for each in trained for of_one in self._pieces(each)])
        return expert_bytes([_in_full(each) for each in rows[0].values()], kinds)

    def move(self, placement: Placement) -> Exchanged:
        """See `PlacedModel`."""
        placed = self._placed
        pieces = [
            {name: self._pieces(each) for name, each in rows.items()} for rows in self._rows()
        ]
        state = ExpertState(
            placed.placement.num_layers,
            agreed_kinds([p for layer in pieces for each in layer.values() for p in each]),
            placed.process_groups.expert_data_parallel
            if self._engine.zero_optimization()
            else None,
        )
        with self._all_in_pieces():
            for layer, rows in enumerate(self._rows()):
                for name, each in rows.items():
                    state.add(layer, name, _weights(state, each), pieces[layer][name])
            exchanged = exchange_experts(
                state.rows,
                old=self.sources,
                new=placement,
                group=placed.process_groups.expert_parallel,
                together=dist.group.WORLD,
            )
            state.store()
        self._engine.placed_experts = placed.under(placement)
        return exchanged

    @contextmanager
    def _all_in_pieces(self) -> Iterator[None]:
        """At ZeRO 3, let no parameter be whole, which would not learn of another piece."""
        partitioned = self._engine.zero_optimization_partition_weights()
        if partitioned:
            self._engine.optimizer.checkpoint_event_prologue()
        try:
            yield
        finally:
            if partitioned:
                self._engine.optimizer.checkpoint_event_epilogue()

    @property
    def _placed(self) -> PlacedExperts:
        return self._engine.placed_experts

    def _rows(self) -> list[Mapping[str, Tensor | Sequence[Tensor]]]:
        """By layer and name, a parameter of S rows, or S parameters or buffers."""
        if self._placed.experts:
            return [dict(experts.local.named_parameters()) for experts in self._placed.experts]
        return [native_rows(layer) for layer in self._placed.native]

    def _pieces(self, rows: Tensor | Sequence[Tensor]) -> list[Mapping[str, Piece]]:
        """Optimizer state of each parameter in the rows; none of buffers."""
        if not is_trained(rows):
            return []
        of = _plain_pieces
        if self._engine.zero_optimization_partition_weights():
            of = _partitioned_pieces
        elif self._engine.zero_optimization():
            of = _zero_pieces
        parameters = [rows] if isinstance(rows, Tensor) else rows
        return [of(self._engine.optimizer, parameter) for parameter in parameters]


def _plain_pieces(optimizer: Any, parameter: nn.Parameter) -> dict[str, Piece]:
    return whole_states(optimizer.state.get(parameter, {}), parameter.shape)


def _zero_pieces(zero: Any, parameter: nn.Parameter) -> dict[str, Piece]:
    """ZeRO 1 and 2 keep master weights and state in a flat slice of each parameter group."""
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:  # On another rank, or not trained.
        return {}
    (flat,) = zero.optimizer.param_groups[mapping.param_group_index]["params"]
    source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
    states = whole_states(zero.optimizer.state.get(flat, {}), flat.shape)
    states[MASTER] = Piece(values=flat.detach())
    return {
        name: Piece(
            values=piece.values[target.start : target.start + target.numel], start=source.start
        )
        for name, piece in states.items()
    }


def _partitioned_pieces(zero: Any, parameter: nn.Parameter) -> dict[str, Piece]:
    """ZeRO 3 keeps master weights and state of a piece of each parameter."""
    if not parameter.requires_grad:
        return {}
    group, at, numel = zero.grad_position[zero.get_param_id(parameter)]
    flat = zero.fp32_partitioned_groups_flat[group]
    states = whole_states(zero.optimizer.state.get(flat, {}), flat.shape)
    weights = zero.fp16_partitioned_groups_flat[group]
    if flat.data_ptr() != weights.data_ptr():  # In single precision they are the weights.
        states[MASTER] = Piece(values=flat.detach())
    return {
        name: without_padding(parameter, piece.values[at : at + numel])
        for name, piece in states.items()
    }


def without_padding(parameter: nn.Parameter, values: Tensor) -> Piece:
    """What this rank's piece has of a parameter at ZeRO 3: the last one is filled up."""
    start = len(values) * parameter.ds_process_group.rank()
    return Piece(values=values[: max(0, parameter.ds_numel - start)], start=start)


def _weights(state: ExpertState, rows: Tensor | Sequence[Tensor]) -> Tensor | Sequence[Tensor]:
    """The weights themselves; at ZeRO 3 put together."""
    if not hasattr(rows, "ds_tensor"):
        return rows
    values = rows.ds_tensor.detach().view(-1)
    return state.whole(rows.ds_shape, values.device, without_padding(rows, values), values.dtype)


def _in_full(rows: Tensor | Sequence[Tensor]) -> Tensor | Sequence[Tensor]:
    """The same in shape and kind, of the shape that a parameter has at ZeRO 3 when it is whole."""
    if not hasattr(rows, "ds_shape"):
        return rows
    shape = torch.empty(rows.ds_shape, dtype=rows.dtype, device="meta")
    return nn.Parameter(shape, requires_grad=rows.requires_grad)
