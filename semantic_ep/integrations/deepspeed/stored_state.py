"""Optimizer state as DeepSpeed stored it, by parameter and expert.

DeepSpeed stores what each rank held: at ZeRO 0 one optimizer an EP rank, at ZeRO 1 and 2 a flat
slice of each parameter group a data-parallel rank, with the names and offsets in it, and at ZeRO 3
an equal piece of every parameter a rank. Here every parameter is put together again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from semantic_ep.errors import CheckpointError, explain
from semantic_ep.integrations.deepspeed.placing import PARTITIONED
from semantic_ep.plan.placement import Placement

MASTER = "fp32"
"""Name of the master weights among the states of a parameter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OldLayout:
    """Where the experts of a run are.

    Attributes:
        placement: On the slots of G EP ranks.
        expert_parallel: Ranks of every expert-parallel group.
    """

    placement: Placement
    expert_parallel: tuple[tuple[int, ...], ...]

    def equals(self, other: OldLayout) -> bool:
        """Whether every rank holds the same."""
        return self.expert_parallel == other.expert_parallel and np.array_equal(
            self.placement.physical_to_logical_map, other.placement.physical_to_logical_map
        )

    @property
    def ranks(self) -> list[int]:
        """All ranks."""
        return sorted(rank for group in self.expert_parallel for rank in group)

    def holders(self, ep_rank: int) -> list[int]:
        """Ranks that hold the experts of an EP rank."""
        return sorted(group[ep_rank] for group in self.expert_parallel)


class OldState(Protocol):
    """What a run stored of its optimizer."""

    def states(self, name: str, ep_rank: int | None) -> Mapping[str, Tensor]:
        """Flat full tensors of a parameter by state; `ep_rank` for experts, else None."""
        ...

    def scalars(self, name: str) -> Mapping[str, Any]:
        """States that a parameter group has once, such as the step."""
        ...

    def hyperparameters(self, name: str) -> Mapping[str, Any]:
        """Settings of the parameter group of a parameter, such as the learning rate."""
        ...


def states_of_slots(
    old: OldState,
    name: str,
    placement: Placement,
    layer: int,
    held_S: Sequence[int] | np.ndarray,
    *,
    expert_shape: Sequence[int],
) -> dict[str, Tensor]:
    """State -> [S, ...] tensor of the experts in some slots, zeros for empty ones.

    Args:
        old: What was stored under `placement`.
        name: Of the parameter.
        placement: Of the run that stored it.
        layer: MoE layer of the parameter.
        held_S: Logical expert in each slot, -1 for an empty one.
        expert_shape: Of one expert's part of the parameter.
    """
    by_rank = [
        {
            key: value.view(placement.slots_per_rank, *expert_shape)
            for key, value in old.states(name, rank).items()
        }
        for rank in range(placement.ep_size)
    ]
    states = {key: value.new_zeros(len(held_S), *expert_shape) for key, value in by_rank[0].items()}
    for slot, expert in enumerate(held_S):
        if expert >= 0:
            source = int(placement.logical_to_physical_map[layer, expert, 0])
            rank, row = divmod(source, placement.slots_per_rank)
            for key, value in states.items():
                value[slot] = by_rank[rank][key][row]
    return states


class _ShardedState:
    """What ZeRO stored, a file a rank."""

    # Name of the state dict of the optimizer inside.
    _OPTIMIZER: ClassVar[str]
    _group_of: Mapping[str, int]

    def __init__(self, checkpoint: Path, layout: OldLayout) -> None:
        self._layout = layout
        self._shards = {
            rank: load_stored(_shard_file(checkpoint, rank))["optimizer_state_dict"]
            for rank in layout.ranks
        }

    def trains(self, name: str) -> bool:
        """Whether there is state of a parameter."""
        return name in self._group_of

    def scalars(self, name: str) -> Mapping[str, Any]:
        """States that a parameter group has once, such as the step."""
        found = self._optimizer["state"].get(self._index(name), {})
        return {
            key: value
            for key, value in found.items()
            if not isinstance(value, Tensor) or value.numel() == 1
        }

    @property
    def _first(self) -> Mapping[str, Any]:
        first: Mapping[str, Any] = next(iter(self._shards.values()))
        return first

    @property
    def _optimizer(self) -> Mapping[str, Any]:
        optimizer: Mapping[str, Any] = self._first[self._OPTIMIZER]
        return optimizer

    def _holders(self, ep_rank: int | None) -> list[int]:
        """Ranks that have pieces of an EP rank's experts, or of what all share."""
        return self._layout.ranks if ep_rank is None else self._layout.holders(ep_rank)

    def _index(self, name: str) -> int:
        if name not in self._group_of:
            raise _unknown(name)
        return self._group_of[name]


class ZeroState(_ShardedState):
    """What ZeRO 1 and 2 stored: a slice of each parameter group a rank."""

    _OPTIMIZER = "base_optimizer_state"

    @cached_property
    def _group_of(self) -> dict[str, int]:
        return {
            name: index
            for shard in self._shards.values()
            for index, slices in enumerate(shard["param_slice_mappings"])
            for name in slices
        }

    def states(self, name: str, ep_rank: int | None) -> Mapping[str, Tensor]:
        """Flat full tensors of a parameter by state; `ep_rank` for experts, else None."""
        group = self._index(name)
        pieces: dict[str, list[Tensor]] = {}
        # A parameter goes on from one rank's slice to the next one's.
        for rank in self._holders(ep_rank):
            shard = self._shards[rank]
            address = shard["param_slice_mappings"][group].get(name)
            if address is None:
                continue
            flat = {MASTER: shard["single_partition_of_fp32_groups"][group]}
            flat |= shard[self._OPTIMIZER]["state"].get(group, {})
            for key, value in flat.items():
                if isinstance(value, Tensor) and value.numel() > 1:
                    piece = value[address.start : address.start + address.numel]
                    pieces.setdefault(key, []).append(piece)
        return {key: torch.cat(parts) for key, parts in pieces.items()}

    def hyperparameters(self, name: str) -> Mapping[str, Any]:
        """Settings of the parameter group of a parameter, such as the learning rate."""
        return settings_of(self._optimizer["param_groups"][self._index(name)])


class PartitionedState(_ShardedState):
    """What ZeRO 3 stored: of every parameter an equal piece for each of its ranks.

    A parameter of experts has pieces on the ranks that hold the same ones, any other on all ranks.
    Parameters of one group follow each other in a rank's flat tensor, each padded to a whole piece.
    """

    _OPTIMIZER = "optimizer_state_dict"

    def __init__(self, checkpoint: Path, layout: OldLayout) -> None:
        super().__init__(checkpoint, layout)
        model = load_stored(checkpoint / partitioned_model_file(layout.ranks[0]), "model")
        self.shapes: list[dict[str, torch.Size]] = [dict(g) for g in model["param_shapes"]]
        self._group_of = {name: i for i, group in enumerate(self.shapes) for name in group}

    def states(self, name: str, ep_rank: int | None) -> Mapping[str, Tensor]:
        """Flat full tensors of a parameter by state; `ep_rank` for experts, else None."""
        group = self._index(name)
        start, numel = 0, 0
        for other, shape in self.shapes[group].items():
            start, numel = start + numel, _piece_numel(shape, self._ranks_of(group))
            if other == name:
                break
        pieces: dict[str, list[Tensor]] = {}
        for rank in self._holders(ep_rank):
            shard = self._shards[rank]
            flat = {MASTER: shard["fp32_flat_groups"][group]}
            flat |= shard[self._OPTIMIZER]["state"].get(group, {})
            for key, value in flat.items():
                if isinstance(value, Tensor) and value.numel() > 1:
                    pieces.setdefault(key, []).append(value.detach()[start : start + numel])
        whole = self.shapes[group][name].numel()
        return {key: torch.cat(parts)[:whole] for key, parts in pieces.items()}

    def hyperparameters(self, name: str) -> Mapping[str, Any]:
        """Settings of the parameter group of a parameter, such as the learning rate."""
        index = self._index(name)
        return next(settings_of(g) for g in self._optimizer["param_groups"] if index in g["params"])

    def _ranks_of(self, group: int) -> int:
        return int(self._first["ds_zero_partition_groups"][group]["partition_count"])


def _piece_numel(shape: torch.Size, ranks: int) -> int:
    return -(-shape.numel() // ranks)


def stored_by_zero(
    checkpoint: Path, layout: OldLayout, zero_stage: int
) -> ZeroState | PartitionedState:
    """What a run at ZeRO 1, 2 or 3 stored."""
    return (PartitionedState if zero_stage == PARTITIONED else ZeroState)(checkpoint, layout)


class PlainState:
    """What ZeRO 0 stored: torch's own state dict, a file an EP rank."""

    def __init__(
        self,
        engine: Any,
        checkpoint: Path,
        layout: OldLayout,
        parameters: Sequence[Sequence[str]],
    ) -> None:
        self._stored = [
            load_stored(
                Path(engine._get_optimizer_ckpt_name(str(checkpoint.parent), checkpoint.name, rank))
            )["optimizer"]
            for rank in range(layout.placement.ep_size)
        ]
        ordered = [name for group in parameters for name in group]
        self._index = {name: index for index, name in enumerate(ordered)}
        self._group_of = {name: i for i, group in enumerate(parameters) for name in group}

    def states(self, name: str, ep_rank: int | None) -> Mapping[str, Tensor]:
        """Flat full tensors of a parameter by state; `ep_rank` for experts, else None."""
        return {
            key: value.flatten()
            for key, value in self._state(name, ep_rank or 0).items()
            if isinstance(value, Tensor) and value.ndim
        }

    def scalars(self, name: str) -> Mapping[str, Any]:
        """States that are single numbers, such as the step."""
        return {
            key: value
            for key, value in self._state(name, 0).items()
            if not isinstance(value, Tensor) or not value.ndim
        }

    def hyperparameters(self, name: str) -> Mapping[str, Any]:
        """Settings of the parameter group of a parameter, such as the learning rate."""
        if name not in self._group_of:
            raise _unknown(name)
        return settings_of(self._stored[0]["param_groups"][self._group_of[name]])

    def _state(self, name: str, ep_rank: int) -> Mapping[str, Any]:
        if name not in self._index:
            raise _unknown(name)
        return self._stored[ep_rank]["state"].get(self._index[name], {})


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a run changes in a parameter group; its name and kind are the new engine's."""
    return {key: value for key, value in group.items() if key not in ("params", "name", "moe")}


def partitioned_model_file(rank: int) -> str:
    """Name of the file that ZeRO 3 writes for the model of a rank."""
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def _shard_file(checkpoint: Path, rank: int) -> Path:
    name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    # DeepSpeed puts the precision before the name.
    return next(checkpoint.glob(f"*{name}"), checkpoint / name)


def load_stored(file: Path, what: str = "optimizer state") -> Any:
    """What DeepSpeed stored, on the host; a pickle, and read as one.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            explain(f"cannot read the {what}: {error}", where=str(file))
        ) from error


def _unknown(name: str) -> CheckpointError:
    return CheckpointError(
        explain(
            f"the checkpoint has no optimizer state of {name}",
            do="Train the same parameters as the run that wrote it, or pass "
            "load_optimizer_states=False",
        )
    )
