"""DeepSpeed's universal checkpoints of placed experts: in logical order, for any plan and ranks.

DeepSpeed's converter merges experts where a layer is one of AutoEP's, with its names w1, w2 and w3,
and takes every other parameter for one that all ranks share. Here it converts what they share, and
the experts are put together beside it: one [E, ...] tensor for each state, by logical expert, under
the name that the parameter has in the model before its experts are spread. So a run without a plan
can load it too, by DeepSpeed alone.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from semantic_ep.apply.checkpoint.writer import new_directory
from semantic_ep.artifacts import write_file_atomically
from semantic_ep.errors import CheckpointError, explain
from semantic_ep.integrations.deepspeed.placing import PARTITIONED
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
STEP = "step"
ADAM = {MASTER, "exp_avg", "exp_avg_sq"}


def convert_to_universal(
    checkpoint: str | os.PathLike[str], output: str | os.PathLike[str], *, workers: int = 1
) -> int:
    """Convert a checkpoint that was written under a plan; needs no process group.

    Args:
        checkpoint: Directory of one checkpoint (a tag), of ZeRO 1, 2 or 3.
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
    old = stored_by_zero(checkpoint, descriptor.layout, descriptor.zero_stage)
    for name in descriptor.experts:
        _check_state(old, name, checkpoint)
    with new_directory(output) as making:
        shapes = _convert_shared(old, descriptor, checkpoint, making, workers)
        for name, layer in descriptor.experts.items():
            _write_experts(old, descriptor, name, layer, shapes[name], making / "zero")
        if (checkpoint / PROFILE_IN_CHECKPOINT).is_dir():
            shutil.copytree(checkpoint / PROFILE_IN_CHECKPOINT, making / PROFILE_IN_CHECKPOINT)
    write_file_atomically(output.parent / LATEST, output.name.encode())
    return len(descriptor.experts)


def universal_name(name: str) -> str:
    """Name of a parameter of placed experts in the model before they were spread."""
    return name.replace(".local.", ".")


def _check_stored(descriptor: Descriptor, checkpoint: Path) -> None:
    if descriptor.zero_stage == 0:
        raise CheckpointError(
            explain(
                "DeepSpeed's universal checkpoints are made from the optimizer shards of ZeRO",
                where=str(checkpoint),
                got="a checkpoint of ZeRO 0",
                allowed="ZeRO 1, 2 or 3 under a plan",
                do="Train at one of these; checkpoints of a placed run resume under any plan and "
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


def _check_state(old: ZeroState | PartitionedState, name: str, checkpoint: Path) -> None:
    if not old.trains(name):
        raise not_trained(name)
    missing = sorted(ADAM - set(old.states(name, 0)))
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
    old: ZeroState | PartitionedState,
    descriptor: Descriptor,
    checkpoint: Path,
    output: Path,
    workers: int,
) -> Mapping[str, torch.Size]:
    """Let DeepSpeed convert all but the experts; returns the shapes of all on a rank."""
    from deepspeed.checkpoint import ds_to_universal

    in_pieces = descriptor.zero_stage == PARTITIONED
    file_of_rank_0 = partitioned_model_file(0) if in_pieces else _MODEL_FILE
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".shared-") as view:
        for file in checkpoint.iterdir():
            if file.is_file() and file.name != file_of_rank_0:
                Path(view, file.name).symlink_to(file.resolve())
        model = load_stored(checkpoint / file_of_rank_0, "model")
        shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
        # It merges what is named here, as parameters that every rank has a part of.
        model["param_shapes"] = [
            {name: shape for name, shape in group.items() if name not in descriptor.experts}
            for group in model["param_shapes"]
        ]
        torch.save(model, Path(view, file_of_rank_0))
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
    if in_pieces:
        for file in output.glob("zero_pp_rank_*_model_states.pt"):
            file.unlink()
        for name in shapes.keys() - descriptor.experts.keys():
            _shape_shared(old, name, shapes[name], output / "zero" / name)
    # Each stage looks for a name of its own, and reads no weights there.
    del model["module"]
    for name in (_MODEL_FILE, partitioned_model_file(0)):
        torch.save(model, output / name)
    _unify_optimizer(
        output / "zero" / "optimizer_state.pt",
        step=old.scalars(next(iter(descriptor.experts))).get(STEP),
        version=model["ds_version"],
    )
    return shapes


def _shape_shared(
    old: ZeroState | PartitionedState, name: str, shape: torch.Size, folder: Path
) -> None:
    """Give what all ranks share the form that ZeRO 1 and 2 read; from ZeRO 3 it comes flat."""
    from deepspeed.checkpoint import constants

    for key in ADAM:
        file = folder / f"{key}.pt"
        flat = torch.load(file, map_location="cpu", weights_only=True)
        torch.save({constants.PARAM: flat.view(shape), constants.CAT_DIM: 0}, file)
    if (step := old.scalars(name).get(STEP)) is not None:
        torch.save(step, folder / f"{STEP}.pt")


def _unify_optimizer(file: Path, *, step: Any, version: str) -> None:
    """Let any stage read what all parameters share.

    The name of a parameter group says how many ranks share its experts. DeepSpeed would write the
    old name into the groups of the run that loads this.
    """
    state = torch.load(file, map_location="cpu", weights_only=False)
    groups = [{"params": group["params"], **settings_of(group)} for group in state["param_groups"]]
    state.pop("fp32_flat_groups", None)
    state.pop("ds_zero_partition_groups", None)
    state["param_groups"] = groups
    state.setdefault("ds_version", version)
    # Read at ZeRO 3.
    state["optimizer_state_dict"] = {"state": {0: {STEP: step}}, "param_groups": groups}
    torch.save(state, file)


def _write_experts(
    old: ZeroState | PartitionedState,
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
    for key in ADAM:
        # Not marked as an expert of AutoEP, which ZeRO 3 would look for the groups of.
        whole = {
            constants.PARAM: states[key],
            constants.CAT_DIM: 0,
            constants.EP_NUM_EXPERTS: placement.num_experts,
        }
        torch.save(whole, directory / f"{key}.pt")
    # Some optimizers count steps in the parameter group instead.
    if (step := old.scalars(name).get(STEP)) is not None:
        torch.save(step, directory / f"{STEP}.pt")


def not_trained(name: str) -> CheckpointError:
    """The error for experts that an optimizer does not hold."""
    return CheckpointError(
        explain(
            f"{name} is not trained, and DeepSpeed's universal checkpoints restore only what the "
            "optimizer holds",
            do="Resume the checkpoint itself: it needs no conversion for another plan",
        )
    )
