"""Move DeepSpeed's optimizer state between placements, expert-parallel sizes and numbers of ranks.

DeepSpeed stores what each rank held: at ZeRO 0 one optimizer an EP rank, at ZeRO 1 and 2 a flat
slice of each parameter group a data-parallel rank, with the names and offsets in it. Here every
parameter is put together again, experts are taken by their logical id, and the pieces that this
rank holds now are copied into its optimizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from semantic_ep.errors import CheckpointError, explain
from semantic_ep.integrations.deepspeed.placing import PlacedExperts
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


class _OldState(Protocol):
    def states(self, name: str, ep_rank: int | None) -> Mapping[str, Tensor]:
        """Flat full tensors of a parameter by state; `ep_rank` for experts, else None."""
        ...

    def scalars(self, name: str) -> Mapping[str, Any]:
        """States that a parameter group has once, such as the step."""
        ...

    def hyperparameters(self, name: str) -> Mapping[str, Any]:
        """Settings of the parameter group of a parameter, such as the learning rate."""
        ...


def optimizer_parameters(engine: Any) -> tuple[tuple[str, ...], ...]:
    """Names of the parameters in the optimizer's order, by parameter group."""
    if engine.optimizer is None:
        return ()
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    zero = engine.optimizer
    groups = (
        (zero.fp16_groups if engine.zero_optimization_partition_weights() else zero.bit16_groups)
        if engine.zero_optimization()
        else [group["params"] for group in engine.optimizer.param_groups]
    )
    # Mixed precision at ZeRO 0 replaces the parameters by copies without names.
    return tuple(tuple(names.get(id(p), "") for p in group) for group in groups)


def check_can_move(engine: Any, old_stage: int) -> None:
    """Raise `CheckpointError` unless the optimizer state can be moved.

    Args:
        engine: That loads it.
        old_stage: ZeRO stage of the run that saved it.
    """
    new_stage = engine.zero_optimization_stage()
    if (old_stage == 0) != (new_stage == 0):
        obstacle = (
            "ZeRO 0 and ZeRO 1 or 2 store it differently",
            f"Resume with the stage it was saved with ({old_stage})",
        )
    else:
        obstacle = obstacle_to_moving(engine)
    if obstacle is not None:
        problem, do = obstacle
        raise CheckpointError(
            explain(
                f"the optimizer state cannot move to another placement: {problem}",
                where="zero_optimization",
                got=f"saved with stage {old_stage}, loaded with stage {new_stage}",
                do=f"{do}; or pass load_optimizer_states=False to start the optimizer afresh",
            )
        )


def obstacle_to_moving(engine: Any) -> tuple[str, str] | None:
    """Why the optimizer state of an engine cannot be divided by expert, and what to do; or None."""
    if not engine.zero_optimization():
        if isinstance(engine.optimizer, torch.optim.Optimizer):
            return None
        return (
            f"{type(engine.optimizer).__name__} does not name the parameters it stores",
            "Train in mixed precision at ZeRO 1 or 2",
        )
    if engine.zero_optimization_partition_weights():
        return (
            "ZeRO 3 stores it in flat pieces together with that of other experts",
            "Train at ZeRO 1 or 2",
        )
    if engine.optimizer.elastic_checkpoint:
        return (
            "an elastic checkpoint does not say where a parameter is",
            "Set zero_optimization.elastic_checkpoint to false",
        )
    if engine.optimizer.cpu_offload:
        return (
            "the states of an offloaded optimizer cannot be replaced",
            "Remove zero_optimization.offload_optimizer for this start",
        )
    return None


def move_optimizer_state(
    engine: Any, checkpoint: Path, layout: OldLayout, parameters: Sequence[Sequence[str]]
) -> None:
    """Load the optimizer state of a checkpoint that was written under another layout.

    Args:
        engine: With `placed_experts`, its module loaded.
        checkpoint: Directory of the checkpoint.
        layout: Of the run that wrote it.
        parameters: Its `optimizer_parameters`.

    Raises:
        CheckpointError: The checkpoint is incomplete, or is of another model.
    """
    placed: PlacedExperts = engine.placed_experts
    old: _OldState = (
        ZeroState(checkpoint, layout)
        if engine.zero_optimization()
        else _PlainState(engine, checkpoint, layout, parameters)
    )
    reader = _Reader(old, layout.placement, placed, engine.module)
    if engine.zero_optimization():
        _fill_zero(engine.optimizer, reader)
    else:
        _fill_plain(engine.optimizer, reader)


class _Reader:
    """States by name as this rank holds them now."""

    def __init__(
        self, old: _OldState, placement: Placement, placed: PlacedExperts, model: nn.Module
    ) -> None:
        self.old = old
        self._placement, self._placed = placement, placed
        self._layer = {name: layer for name, layer, _ in placed.parameters(model)}
        self.name_of = {id(parameter): name for name, parameter in model.named_parameters()}

    def states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """State -> tensor of the parameter's shape."""
        name = self.name_of[id(parameter)]
        if name not in self._layer:
            found = self.old.states(name, None)
            return {key: value.view(parameter.shape) for key, value in found.items()}
        layer = self._layer[name]
        held_S = self._placed.held_S(layer)
        return states_of_slots(
            self.old, name, self._placement, layer, held_S, expert_shape=parameter.shape[1:]
        )


def states_of_slots(
    old: _OldState,
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


class ZeroState:
    """What ZeRO 1 and 2 stored, a file a rank."""

    def __init__(self, checkpoint: Path, layout: OldLayout) -> None:
        self._layout = layout
        self._shards = {}
        for rank in layout.ranks:
            name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            # DeepSpeed puts the precision before the name.
            file = next(checkpoint.glob(f"*{name}"), checkpoint / name)
            self._shards[rank] = load_stored(file)["optimizer_state_dict"]

    def trains(self, name: str) -> bool:
        """Whether there is state of a parameter."""
        return name in self._group_of

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
        ranks = self._layout.ranks if ep_rank is None else self._layout.holders(ep_rank)
        group = self._index(name)
        pieces: dict[str, list[Tensor]] = {}
        # A parameter goes on from one rank's slice to the next one's.
        for rank in ranks:
            shard = self._shards[rank]
            address = shard["param_slice_mappings"][group].get(name)
            if address is None:
                continue
            flat = {MASTER: shard["single_partition_of_fp32_groups"][group]}
            flat |= shard["base_optimizer_state"]["state"].get(group, {})
            for key, value in flat.items():
                if isinstance(value, Tensor) and value.numel() > 1:
                    piece = value[address.start : address.start + address.numel]
                    pieces.setdefault(key, []).append(piece)
        return {key: torch.cat(parts) for key, parts in pieces.items()}

    def scalars(self, name: str) -> Mapping[str, Any]:
        """States that a parameter group has once, such as the step."""
        states = next(iter(self._shards.values()))["base_optimizer_state"]["state"]
        found = states.get(self._index(name), {})
        return {
            key: value
            for key, value in found.items()
            if not isinstance(value, Tensor) or value.numel() == 1
        }

    def hyperparameters(self, name: str) -> Mapping[str, Any]:
        """Settings of the parameter group of a parameter, such as the learning rate."""
        shard = next(iter(self._shards.values()))
        return _settings(shard["base_optimizer_state"]["param_groups"][self._index(name)])

    def _index(self, name: str) -> int:
        if name not in self._group_of:
            raise _unknown(name)
        return self._group_of[name]


class _PlainState:
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
        return {
            key: value.flatten()
            for key, value in self._state(name, ep_rank or 0).items()
            if isinstance(value, Tensor) and value.ndim
        }

    def scalars(self, name: str) -> Mapping[str, Any]:
        return {
            key: value
            for key, value in self._state(name, 0).items()
            if not isinstance(value, Tensor) or not value.ndim
        }

    def hyperparameters(self, name: str) -> Mapping[str, Any]:
        if name not in self._group_of:
            raise _unknown(name)
        return _settings(self._stored[0]["param_groups"][self._group_of[name]])

    def _state(self, name: str, ep_rank: int) -> Mapping[str, Any]:
        if name not in self._index:
            raise _unknown(name)
        return self._stored[ep_rank]["state"].get(self._index[name], {})


def _fill_zero(zero: Any, reader: _Reader) -> None:
    for index, group in enumerate(zero.optimizer.param_groups):
        (flat,) = group["params"]
        state: dict[str, Any] = {}
        first = reader.name_of[id(zero.bit16_groups[index][0])]
        for parameter in zero.bit16_groups[index]:
            mapping = parameter._hp_mapping
            if mapping is None:  # On another rank.
                continue
            source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
            for key, value in reader.states(parameter).items():
                piece = value.flatten()[source.start : source.start + source.numel]
                if key == MASTER:
                    mapping.hp_fragment.data.copy_(piece)
                    continue
                buffer = state.setdefault(key, torch.zeros_like(flat.data))
                buffer[target.start : target.start + target.numel] = piece
        if state:
            zero.optimizer.state[flat] = {**state, **_copied(reader.old.scalars(first))}
        group.update(reader.old.hyperparameters(first))
    zero._link_all_hp_params()
    zero._hp_optimizer_states_linked = False


def _fill_plain(optimizer: torch.optim.Optimizer, reader: _Reader) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = reader.name_of[id(parameter)]
            states = {
                key: value.to(parameter.device, copy=True)
                for key, value in reader.states(parameter).items()
            }
            if states:
                optimizer.state[parameter] = {**states, **_copied(reader.old.scalars(name))}
        group.update(reader.old.hyperparameters(reader.name_of[id(group["params"][0])]))


def _copied(scalars: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in scalars.items()}


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a run changes in a parameter group; its name and kind are the new engine's."""
    return {key: value for key, value in group.items() if key not in ("params", "name", "moe")}


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
