"""Distributed checkpoints in logical order, whatever slots the experts sit in.

`dist_checkpointing` stacks the experts of a layer along one axis of a global tensor, at the index
of their slot. Writing the logical expert instead makes the checkpoint independent of the placement:
a contiguous one loads into a placed model and back, at any expert-parallel size. The optimizer
derives its own entries from these, so its state follows. Of several copies of an expert the first
is written, and all are filled when a checkpoint is loaded.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from megatron.core.dist_checkpointing import load_tensors_metadata
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)

from semantic_ep.errors import CheckpointError, explain

_EXPERT_IN_KEY = re.compile(r"(?<=\.experts\.experts\.)\d+(?=\.)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotLabels:
    """What a checkpoint calls the slots of one layer.

    Attributes:
        axis: Axis of the global tensors along which experts are stacked.
        expert: [G * S] logical expert of each slot.
        copy: [G * S] which copy of its expert a slot holds; 0 is written, the others only load.
    """

    axis: int
    expert: Sequence[int]
    copy: Sequence[int]


def to_logical_order(entries: Iterable[Any], labels: SlotLabels) -> None:
    """Relabel the experts of one layer in place, so that tensors are [E, ...] whatever the slots.

    Args:
        entries: Values of the layer's sharded state dict that belong to its experts.
        labels: Of the layer's slots.

    Raises:
        CheckpointError: An entry is of a kind that carries no expert index.
    """
    for entry in entries:
        if isinstance(entry, ShardedTensorFactory):
            entry.build_fn = _relabelling(entry.build_fn, labels)
        elif isinstance(entry, ShardedTensor | ShardedObject):
            _relabel(entry, labels)
        else:
            raise CheckpointError(
                explain(
                    "an entry of the experts' state cannot be written in logical order",
                    got=type(entry).__name__,
                    allowed="ShardedTensor, ShardedTensorFactory, ShardedObject",
                )
            )


def check_optimizer_fits(directory: str | os.PathLike[str], optimizer: Any) -> None:
    """Refuse a checkpoint whose optimizer state Megatron names otherwise; collective.

    Experts that are spread over ranks have an optimizer of their own, chained to that of the other
    parameters, which is in the names of the states. From one expert-parallel size above 1 to
    another the names are the same, and states load.

    Args:
        directory: Of a `torch_dist` checkpoint.
        optimizer: Of `get_megatron_optimizer`, that would load it.

    Raises:
        CheckpointError: One of the two runs spreads experts, and the other does not.
    """
    stored = [key for key in load_tensors_metadata(str(directory)) if "optimizer.state" in key]
    was_chained = any(key.startswith("chained_") for key in stored)
    is_chained = len(getattr(optimizer, "chained_optimizers", ())) > 1
    if stored and was_chained != is_chained:
        raise CheckpointError(
            explain(
                "Megatron keeps the optimizer state of experts apart where they are spread over "
                "ranks, and cannot load it where they are not, or the other way round",
                where=f"--expert-model-parallel-size, and {directory}",
                got=f"saved with experts {_SPREAD[was_chained]}, loaded with experts "
                f"{_SPREAD[is_chained]}",
                do="Keep --expert-model-parallel-size above 1, at any size, or at 1; or pass "
                "--no-load-optim to start the optimizer afresh",
            )
        )


_SPREAD = {True: "spread", False: "not spread"}


def _relabelling(build: Any, labels: SlotLabels) -> Any:
    """Factories make their tensors late, from an index of their own: relabel what comes out."""

    def build_in_logical_order(*args: Any, **kwargs: Any) -> Any:
        built = build(*args, **kwargs)
        to_logical_order(_leaves(built), labels)
        return built

    return build_in_logical_order


def _relabel(entry: ShardedTensor | ShardedObject, labels: SlotLabels) -> None:
    named = _EXPERT_IN_KEY.search(entry.key)
    if named is not None:  # One key an expert: the index is in the name, not in the offset.
        slot = int(named[0])
        entry.key = _EXPERT_IN_KEY.sub(str(int(labels.expert[slot])), entry.key)
    else:
        slot = entry.global_offset[labels.axis]
        entry.global_offset = _with(entry.global_offset, labels.axis, int(labels.expert[slot]))
        experts = int(max(labels.expert)) + 1
        entry.global_shape = _with(entry.global_shape, labels.axis, experts)
        if getattr(entry, "axis_fragmentations", None) is not None:
            entry.axis_fragmentations = _with(entry.axis_fragmentations, labels.axis, experts)
    # The first place is the pipeline stage's, and 0 for experts; the last one may be set anew.
    stage, *others = entry.replica_id
    entry.replica_id = (stage + int(labels.copy[slot]), *others)


def _with(values: Sequence[int], place: int, value: int) -> tuple[int, ...]:
    return (*values[:place], value, *values[place + 1 :])


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for branch in tree.values() for leaf in _leaves(branch)]
    if isinstance(tree, list | tuple):
        return [leaf for branch in tree for leaf in _leaves(branch)]
    return [tree]
