"""Load a universal checkpoint into an engine with placed experts.

Loading is DeepSpeed's, but for the rows of this rank's slots (what is stored:
`semantic_ep.integrations.deepspeed.universal`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from semantic_ep.errors import CheckpointError, explain
from semantic_ep.integrations.deepspeed.placing import PlacedExperts, rows_of_slots
from semantic_ep.integrations.deepspeed.stored_state import MASTER, settings_of
from semantic_ep.integrations.deepspeed.universal import (
    ADAM,
    LATEST,
    STEP,
    not_trained,
    universal_name,
)


@contextlib.contextmanager
def universal_experts(engine: Any, load_dir: str, tag: str | None) -> Iterator[None]:
    """While DeepSpeed loads a universal checkpoint, give this rank the experts of its slots.

    Args:
        engine: With `placed_experts`, at ZeRO 1, 2 or 3.
        load_dir: As in `DeepSpeedEngine.load_checkpoint`.
        tag: As there; None means what `latest_universal` names.

    Raises:
        CheckpointError: The checkpoint has no experts by logical number, or other parameter groups.
    """
    placed: PlacedExperts = engine.placed_experts
    latest = Path(load_dir, LATEST)
    if tag is None and latest.is_file():
        tag = latest.read_text().strip()
    checkpoint = Path(load_dir, str(tag))
    groups = _check_groups(engine, checkpoint)
    folders = {}
    for name, layer, parameter in placed.parameters(engine.module):
        if not parameter.requires_grad:
            raise not_trained(name)
        folder = checkpoint / "zero" / universal_name(name)
        if not folder.is_dir():
            raise CheckpointError(
                explain(
                    f"the universal checkpoint has no experts of {name}",
                    where=str(folder),
                    do="Convert the checkpoint with semantic-ep convert --from deepspeed "
                    "--to universal; DeepSpeed's own converter knows no placed experts",
                )
            )
        folders[parameter] = (folder, layer)
    if engine.zero_optimization_partition_weights():
        with _experts_in_pieces(engine.optimizer, placed, folders):
            yield
        _complete_groups(engine.optimizer.optimizer, groups)
        return
    replaced = []
    for parameter, (folder, layer) in folders.items():
        replaced.append((parameter, parameter.load_hp_checkpoint_state))
        parameter.load_hp_checkpoint_state = MethodType(_loader(folder, placed, layer), parameter)
    try:
        yield
    finally:
        for parameter, load in replaced:
            parameter.load_hp_checkpoint_state = load


@contextlib.contextmanager
def _experts_in_pieces(
    zero: Any, placed: PlacedExperts, folders: Mapping[nn.Parameter, tuple[Path, int]]
) -> Iterator[None]:
    """Replace what ZeRO 3 reads of experts by this rank's pieces of its slots."""
    load = zero.load_hp_checkpoint_state

    def load_hp_checkpoint_state(folder: str, key: str, param: Any = None) -> Tensor:
        if param not in folders:
            piece: Tensor = load(folder, key, param=param)
            return piece
        own, layer = folders[param]
        shape = (placed.placement.num_experts, *param.ds_shape[1:])
        rows = rows_of_slots(_whole(own / f"{key}.pt", shape), placed.held_S(layer)).flatten()
        numel = param.partition_numel()
        start = numel * param.ds_process_group.rank()
        filled = rows.new_zeros(numel)
        mine = rows[start : start + numel]
        filled[: len(mine)] = mine
        return filled

    zero.load_hp_checkpoint_state = load_hp_checkpoint_state
    try:
        yield
    finally:
        del zero.load_hp_checkpoint_state


def _complete_groups(optimizer: Any, stored: Sequence[Mapping[str, Any]]) -> None:
    """At ZeRO 3 DeepSpeed gives all groups the settings of the first, and states one step count."""
    for group, settings in zip(optimizer.param_groups, stored, strict=True):
        group.update(settings_of(settings))
    for state in optimizer.state.values():
        if isinstance(state.get(STEP), Tensor):
            state[STEP] = state[STEP].clone()


def _check_groups(engine: Any, checkpoint: Path) -> Sequence[Mapping[str, Any]]:
    """The stored parameter groups, as many as the run has."""
    file = checkpoint / "zero" / "optimizer_state.pt"
    try:
        stored = torch.load(file, map_location="cpu", weights_only=False)["param_groups"]
    except (OSError, RuntimeError, EOFError, KeyError) as error:
        raise CheckpointError(
            explain(
                f"this is no universal checkpoint: {error}",
                where=str(file),
                do="Convert one with semantic-ep convert --from deepspeed --to universal, or "
                "remove checkpoint.load_universal",
            )
        ) from error
    groups = engine.optimizer.optimizer.param_groups
    if len(stored) != len(groups):
        # DeepSpeed goes through both side by side and leaves out the rest without a word.
        raise CheckpointError(
            explain(
                "the universal checkpoint has other parameter groups than this run",
                where=str(file),
                got=len(stored),
                allowed=len(groups),
                do="Load one of a run under a plan, with the same groups of parameters",
            )
        )
    return list(stored)


def _loader(folder: Path, placed: PlacedExperts, layer: int) -> Callable[..., Any]:
    """A `load_hp_checkpoint_state` of DeepSpeed's, for the slots of this rank."""

    def load_hp_checkpoint_state(parameter: nn.Parameter, *_: Any, **__: Any) -> Any:
        mapping = parameter._hp_mapping
        mapping.optim_fragment = {}
        source = mapping.lp_fragment_address
        shape = (placed.placement.num_experts, *parameter.shape[1:])
        for key in ADAM:
            rows = rows_of_slots(_whole(folder / f"{key}.pt", shape), placed.held_S(layer))
            piece = rows.flatten()[source.start : source.start + source.numel]
            if key == MASTER:
                mapping.get_hp_fragment().data.copy_(piece)
            else:
                mapping.optim_fragment[key] = piece.clone()
        step = folder / f"{STEP}.pt"
        return torch.load(step, weights_only=False) if step.is_file() else None

    return load_hp_checkpoint_state


def _whole(file: Path, shape: tuple[int, ...]) -> Tensor:
    from deepspeed.checkpoint import constants

    try:
        whole: Tensor = torch.load(file, map_location="cpu", mmap=True)[constants.PARAM]
    except (OSError, RuntimeError, EOFError, KeyError) as error:
        raise CheckpointError(
            explain(f"cannot read the experts: {error}", where=str(file))
        ) from error
    if tuple(whole.shape) != shape:
        raise CheckpointError(
            explain(
                "the universal checkpoint is of another model",
                where=str(file),
                got=tuple(whole.shape),
                allowed=shape,
            )
        )
    return whole
