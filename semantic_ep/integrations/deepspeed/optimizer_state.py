"""Move DeepSpeed's optimizer state between placements, expert-parallel sizes and numbers of ranks.

What was stored is put together by parameter (`semantic_ep.integrations.deepspeed.stored_state`),
experts are taken by their logical id, and the pieces that this rank holds now are copied into its
optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from semantic_ep.errors import CheckpointError, explain
from semantic_ep.integrations.deepspeed.placing import PARTITIONED, PlacedExperts
from semantic_ep.integrations.deepspeed.stored_state import (
    MASTER,
    OldLayout,
    OldState,
    PlainState,
    states_of_slots,
    stored_by_zero,
)
from semantic_ep.plan.placement import Placement


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
    zero = engine.optimizer
    if not engine.zero_optimization():
        if isinstance(zero, torch.optim.Optimizer):
            return None
        return (
            f"{type(zero).__name__} does not name the parameters it stores",
            "Train in mixed precision at ZeRO 1, 2 or 3",
        )
    if zero.elastic_checkpoint:
        return (
            "an elastic checkpoint does not say where a parameter is",
            "Set zero_optimization.elastic_checkpoint to false",
        )
    partitioned = engine.zero_optimization_partition_weights()
    if partitioned and (zero.swap_optimizer or zero.offload_param):
        return (
            "parameters, or what the optimizer keeps of them, lie outside of memory or come and go",
            "Remove zero_optimization.offload_param, and offload_optimizer to nvme",
        )
    return None


def move_optimizer_state(
    engine: Any,
    checkpoint: Path,
    layout: OldLayout,
    parameters: Sequence[Sequence[str]],
    *,
    weights_only: bool = False,
) -> None:
    """Load the optimizer state of a checkpoint that was written under another layout.

    At ZeRO 3 that brings the weights too, which are nowhere else.

    Args:
        engine: With `placed_experts`, its module loaded.
        checkpoint: Directory of the checkpoint.
        layout: Of the run that wrote it.
        parameters: Its `optimizer_parameters`.
        weights_only: At ZeRO 3, leave the optimizer as it is but for its master weights.

    Raises:
        CheckpointError: The checkpoint is incomplete, or is of another model.
    """
    placed: PlacedExperts = engine.placed_experts
    stage = engine.zero_optimization_stage()
    old = (
        stored_by_zero(checkpoint, layout, stage)
        if stage
        else PlainState(engine, checkpoint, layout, parameters)
    )
    reader = _Reader(old, layout.placement, placed, engine.module)
    if stage == PARTITIONED:
        _fill_partitioned(engine.optimizer, reader, weights_only=weights_only)
    elif stage:
        _fill_zero(engine.optimizer, reader)
    else:
        _fill_plain(engine.optimizer, reader)


class _Reader:
    """States by name as this rank holds them now."""

    def __init__(
        self, old: OldState, placement: Placement, placed: PlacedExperts, model: nn.Module
    ) -> None:
        self.old = old
        self._placement, self._placed = placement, placed
        self._layer = {name: layer for name, layer, _ in placed.parameters(model)}
        self.name_of = {id(parameter): name for name, parameter in model.named_parameters()}

    def states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """State -> tensor of the parameter's shape."""
        name = self.name_of[id(parameter)]
        shape = full_shape(parameter)
        if name not in self._layer:
            found = self.old.states(name, None)
            return {key: value.view(shape) for key, value in found.items()}
        layer = self._layer[name]
        held_S = self._placed.held_S(layer)
        return states_of_slots(
            self.old, name, self._placement, layer, held_S, expert_shape=shape[1:]
        )


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


def _fill_partitioned(zero: Any, reader: _Reader, *, weights_only: bool) -> None:
    zero.checkpoint_event_prologue()
    for index, parameters in enumerate(zero.fp16_groups):
        flat = zero.fp32_partitioned_groups_flat[index]
        first = reader.name_of[id(parameters[0])]
        state: dict[str, Any] = {}
        for parameter, piece, start in pieces_of_group(parameters):
            for key, value in reader.states(parameter).items():
                if key == MASTER:
                    buffer = flat.data
                elif weights_only:
                    continue
                else:
                    buffer = state.setdefault(key, torch.zeros_like(flat.data))
                mine = value.flatten()[start : start + piece.stop - piece.start]
                # What pads the last piece is nobody's.
                buffer[piece.start : piece.start + len(mine)] = mine
        # From the master weights to the weights, as after a step.
        zero._reassign_or_swap_out_partitioned_parameters(index)
        if weights_only:
            continue
        if state:
            zero.optimizer.state[flat] = {**state, **_copied(reader.old.scalars(first))}
        group = zero.optimizer.param_groups[zero.sub_group_to_group_id[index]]
        group.update(reader.old.hyperparameters(first))
    zero.checkpoint_event_epilogue()


def pieces_of_group(
    parameters: Sequence[nn.Parameter],
) -> Iterator[tuple[nn.Parameter, slice, int]]:
    """What ZeRO 3 keeps of a group of parameters on this rank, one after the other.

    Yields:
        (parameter, its part of the flat tensor, where that begins in the flattened parameter).
    """
    at = 0
    for parameter in parameters:
        numel = parameter.partition_numel()
        yield parameter, slice(at, at + numel), numel * parameter.ds_process_group.rank()
        at += numel


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of a parameter, which at ZeRO 3 its own does not tell."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


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
