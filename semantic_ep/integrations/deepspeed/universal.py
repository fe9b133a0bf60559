"""DeepSpeed's universal checkpoints of placed experts: in logical order, for any plan and ranks.

DeepSpeed's converter merges experts where a layer is one of AutoEP's, with its names w1, w2 and w3,
and takes every other parameter for one that all ranks share. Here it converts what they share, and
the experts are put together beside it: one [E, ...] tensor for each state, by logical expert, under
the name that the parameter has in the model before its experts are spread. So a run without a plan
can load it too, by DeepSpeed alone. Loading is DeepSpeed's, but for the rows of this rank's slots.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from semantic_ep.apply.checkpoint.writer import new_directory
from semantic_ep.artifacts import write_file_atomically
from semantic_ep.errors import CheckpointError, explain
from semantic_ep.integrations.deepspeed.placing import PARTITIONED, PlacedExperts, rows_of_slots
from semantic_ep.integrations.deepspeed.stored_state import (
    MASTER,
    PartitionedState,
    ZeroState,
    load_stored,
    partitioned_model_file,
    settings_of,
    states_of_slots,
    stored_by_zero,
)
from semantic_ep.integrations.observation import PROFILE_IN_CHECKPOINT

if TYPE_CHECKING:
    from semantic_ep.integrations.deepspeed.placed_checkpoint import Descriptor

logger = logging.getLogger(__name__)

NATIVE = (
    "deepspeed.moe layers have no universal form: DeepSpeed's converter takes the experts of all "
    "ranks for parts of one (deepspeed/checkpoint/ds_to_universal.py, _merge_zero_shards)"
)
LATEST = "latest_universal"
_MODEL_FILE = "mp_rank_00_model_states.pt"
_STEP = "step"
_ADAM = {MASTER, "exp_avg", "exp_avg_sq"}


def convert_to_universal(
    checkpoint: str | os.PathLike[str], output: str | os.PathLike[str], *, workers: int = 1
) -> int:
    """Convert a checkpoint that was written under a plan; needs no process group.

    Args:
        checkpoint: Directory of one checkpoint (a tag), of ZeRO 1 or 2.
        output: Directory to make, the new tag; `latest_universal` beside it will name it.
        workers: Processes that DeepSpeed's converter uses.

    Returns:
        Number of parameters of experts.

    Raises:
        CheckpointError: The checkpoint cannot be converted, or the output exists.
    """
    from semantic_ep.integrations.deepspeed.placed_checkpoint import Descriptor

    checkpoint, output = Path(checkpoint), Path(output)
    descriptor = Descriptor.read(checkpoint)
    _check_stored(descriptor, checkpoint)
    old = ZeroState(checkpoint, descriptor.layout)
    for name in descriptor.experts:
        _check_state(old, name, checkpoint)
    with new_directory(output) as making:
        shapes = _convert_shared(descriptor, checkpoint, making, workers)
        for name, layer in descriptor.experts.items():
            _write_experts(old, descriptor, name, layer, shapes[name], making / "zero")
        if (checkpoint / PROFILE_IN_CHECKPOINT).is_dir():
            shutil.copytree(checkpoint / PROFILE_IN_CHECKPOINT, making / PROFILE_IN_CHECKPOINT)
    write_file_atomically(output.parent / LATEST, output.name.encode())
    return len(descriptor.experts)


@contextlib.contextmanager
def universal_experts(engine: Any, load_dir: str, tag: str | None) -> Iterator[None]:
    """While DeepSpeed loads a universal checkpoint, give this rank the experts of its slots.

    Args:
        engine: With `placed_experts`, at ZeRO 1 or 2.
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
    _check_groups(engine, checkpoint)
    replaced = []
    for name, layer, parameter in placed.parameters(engine.module):
        if not parameter.requires_grad:
            raise _not_trained(name)
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
        replaced.append((parameter, parameter.load_hp_checkpoint_state))
        parameter.load_hp_checkpoint_state = MethodType(_loader(folder, placed, layer), parameter)
    try:
        yield
    finally:
        for parameter, load in replaced:
            parameter.load_hp_checkpoint_state = load


def universal_name(name: str) -> str:
    """Name of a parameter of placed experts in the model before they were spread."""
    return name.replace(".local.", ".")


def _check_stored(descriptor: Descriptor, checkpoint: Path) -> None:
    if descriptor.zero_stage not in (1, 2):
        raise CheckpointError(
            explain(
                "DeepSpeed's universal checkpoints are made from the optimizer shards of ZeRO",
                where=str(checkpoint),
                got=f"a checkpoint of ZeRO {descriptor.zero_stage}",
                allowed="ZeRO 1 or 2 under a plan",
                do="Train at ZeRO 1 or 2; checkpoints of a placed run resume under any plan and "
                "number of ranks without conversion too",
            )
        )
    if not descriptor.experts:
        raise CheckpointError(
            explain(
                NATIVE,
                where=str(checkpoint),
                do="Resume the checkpoint itself, under its own plan",
            )
        )


def _check_state(old: ZeroState, name: str, checkpoint: Path) -> None:
    if not old.trains(name):
        raise _not_trained(name)
    missing = sorted(_ADAM - set(old.states(name, 0)))
    if missing:
        raise CheckpointError(
            explain(
                "DeepSpeed converts the state of Adam only "
                "(deepspeed/checkpoint/ds_to_universal.py, extract_zero_shards)",
                where=str(checkpoint),
                got=f"no {', '.join(missing)} of {name}",
                do="Resume the checkpoint itself: it needs no conversion for another plan",
            )
        )


def _convert_shared(
    descriptor: Descriptor, checkpoint: Path, output: Path, workers: int
) -> Mapping[str, torch.Size]:
    """Let DeepSpeed convert all but the experts; returns the shapes of these on a rank."""
    from deepspeed.checkpoint import ds_to_universal

    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".shared-") as view:
        for file in checkpoint.iterdir():
            if file.is_file() and file.name != _MODEL_FILE:
                Path(view, file.name).symlink_to(file.resolve())
        model = load_stored(checkpoint / _MODEL_FILE, "model")
        shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
        # It merges what is named here, as parameters that every rank has a part of.
        model["param_shapes"] = [
            {name: shape for name, shape in group.items() if name not in descriptor.experts}
            for group in model["param_shapes"]
        ]
        torch.save(model, Path(view, _MODEL_FILE))
        arguments = Namespace(
            input_folder=view,
            output_folder=str(output),
            num_extract_workers=workers,
            num_merge_workers=workers,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        progress = io.StringIO()
        # It names its output as the latest one, which is still under another name.
        latest = output.parent / LATEST
        before = latest.read_bytes() if latest.is_file() else None
        try:
            with contextlib.redirect_stdout(progress), contextlib.redirect_stderr(progress):
                ds_to_universal.main(arguments)
        finally:
            logger.debug("%s", progress.getvalue())
            if before is not None:
                write_file_atomically(latest, before)
            else:
                latest.unlink(missing_ok=True)
    _forget_group_names(output / "zero" / "optimizer_state.pt")
    return shapes


def _forget_group_names(file: Path) -> None:
    """The name of a parameter group says how many ranks share its experts.

    DeepSpeed would write the old name into the groups of the run that loads this.
    """
    state = torch.load(file, map_location="cpu", weights_only=False)
    for group in state["param_groups"]:
        group.pop("name", None)
        group.pop("moe", None)
    torch.save(state, file)


def _write_experts(
    old: ZeroState,
    descriptor: Descriptor,
    name: str,
    layer: int,
    shape: torch.Size,
    zero: Path,
) -> None:
    from deepspeed.checkpoint import constants

    placement = descriptor.layout.placement
    states = states_of_slots(
        old, name, placement, layer, range(placement.num_experts), expert_shape=shape[1:]
    )
    directory = zero / universal_name(name)
    directory.mkdir(parents=True, exist_ok=True)
    for key in _ADAM:
        # As DeepSpeed writes experts of AutoEP.
        whole = {
            constants.PARAM: states[key],
            constants.CAT_DIM: 0,
            constants.EP_IS_EXPERT_PARAM: True,
            constants.EP_NUM_EXPERTS: placement.num_experts,
        }
        torch.save(whole, directory / f"{key}.pt")
    # Some optimizers count steps in the parameter group instead.
    if (step := old.scalars(name).get(_STEP)) is not None:
        torch.save(step, directory / f"{_STEP}.pt")


def _check_groups(engine: Any, checkpoint: Path) -> None:
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


def _loader(folder: Path, placed: PlacedExperts, layer: int) -> Callable[..., Any]:
    """A `load_hp_checkpoint_state` of DeepSpeed's, for the slots of this rank."""

    def load_hp_checkpoint_state(parameter: nn.Parameter, *_: Any, **__: Any) -> Any:
        mapping = parameter._hp_mapping
        mapping.optim_fragment = {}
        source = mapping.lp_fragment_address
        shape = (placed.placement.num_experts, *parameter.shape[1:])
        for key in _ADAM:
            rows = rows_of_slots(_whole(folder / f"{key}.pt", shape), placed.held_S(layer))
            piece = rows.flatten()[source.start : source.start + source.numel]
            if key == MASTER:
                mapping.get_hp_fragment().data.copy_(piece)
            else:
                mapping.optim_fragment[key] = piece.clone()
        step = folder / f"{_STEP}.pt"
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


def _not_trained(name: str) -> CheckpointError:
    return CheckpointError(
        explain(
            f"{name} is not trained, and DeepSpeed's universal checkpoints restore only what the "
            "optimizer holds",
            do="Resume the checkpoint itself: it needs no conversion for another plan",
        )
    )
