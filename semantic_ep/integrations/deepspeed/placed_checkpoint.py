"""Checkpoints of placed experts: stored by logical expert, resumed under any placement.

Beside DeepSpeed's files a checkpoint has `semantic_ep_placement.json`, the descriptor of where
experts were, and one `experts-<EP rank>.safetensors` a rank, whose tensors are named by logical
expert. Under the same placement and groups everything else is DeepSpeed's own load, bit for bit.
Otherwise experts are read by logical id, and the optimizer state is put together from DeepSpeed's
shards of the old ranks (`semantic_ep.integrations.deepspeed.optimizer_state`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from semantic_ep.artifacts import write_file_atomically
from semantic_ep.errors import CheckpointError, explain
from semantic_ep.integrations.deepspeed.optimizer_state import (
    check_can_move,
    move_optimizer_state,
    optimizer_parameters,
)
from semantic_ep.integrations.deepspeed.placing import PARTITIONED, PlacedExperts
from semantic_ep.integrations.deepspeed.stored_state import OldLayout
from semantic_ep.integrations.deepspeed.universal_loading import universal_experts
from semantic_ep.plan.placement import Placement

DESCRIPTOR = "semantic_ep_placement.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Descriptor:
    """Where the experts of a checkpoint were.

    Attributes:
        layout: Placement and groups of the run that wrote it.
        zero_stage: Of that run.
        parameters: Names in the optimizer's order, by parameter group.
        experts: MoE layer of each parameter of experts, by name; none of `deepspeed.moe` layers.
    """

    layout: OldLayout
    zero_stage: int
    parameters: tuple[tuple[str, ...], ...]
    experts: Mapping[str, int]

    @classmethod
    def of(cls, engine: Any) -> Self:
        """Describe a running engine."""
        placed: PlacedExperts = engine.placed_experts
        return cls(
            layout=OldLayout(
                placement=placed.placement, expert_parallel=placed.groups.expert_parallel
            ),
            zero_stage=engine.zero_optimization_stage(),
            parameters=optimizer_parameters(engine),
            experts={name: layer for name, layer, _ in placed.parameters(engine.module)},
        )

    @classmethod
    def read(cls, checkpoint: Path) -> Self:
        """Read the descriptor of a checkpoint.

        Raises:
            CheckpointError: There is none, or it is damaged.
        """
        file = checkpoint / DESCRIPTOR
        try:
            data = json.loads(file.read_text())
            placement = Placement(
                physical_to_logical_map=np.array(data["physical_to_logical_map"]),
                num_experts=data["num_experts"],
                ep_size=data["ep_size"],
            )
            return cls(
                layout=OldLayout(
                    placement=placement,
                    expert_parallel=tuple(map(tuple, data["expert_parallel"])),
                ),
                zero_stage=data["zero_stage"],
                parameters=tuple(map(tuple, data["parameters"])),
                experts=data.get("experts", {}),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                explain(
                    f"this checkpoint does not say where its experts are: {error}",
                    where=str(file),
                    do="Resume a checkpoint that was written under a plan; start from others with "
                    "save_huggingface_checkpoint and from_pretrained",
                )
            ) from error

    def write(self, checkpoint: Path) -> None:
        """Write it, whole or not at all."""
        placement = self.layout.placement
        data = {
            "schema_version": 1,
            "num_experts": placement.num_experts,
            "ep_size": placement.ep_size,
            "physical_to_logical_map": placement.physical_to_logical_map.tolist(),
            "expert_parallel": self.layout.expert_parallel,
            "zero_stage": self.zero_stage,
            "parameters": self.parameters,
            "experts": dict(self.experts),
        }
        write_file_atomically(checkpoint / DESCRIPTOR, json.dumps(data).encode())


def write_placed(engine: Any, checkpoint: Path) -> None:
    """Write descriptor and experts; one replica of each expert writes, on its own rank."""
    from safetensors.torch import save_file

    placed: PlacedExperts = engine.placed_experts
    checkpoint.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        Descriptor.of(engine).write(checkpoint)
    if placed.process_groups.expert_data_parallel.rank() != 0 or not placed.experts:
        return
    if engine.zero_optimization_partition_weights():
        return  # DeepSpeed's shards have them.
    tensors = {}
    for name, layer, parameter in placed.parameters(engine.module):
        for slot, expert in enumerate(placed.held_S(layer).tolist()):
            if expert >= 0:
                tensors[f"{name}.{expert}"] = parameter.detach()[slot].cpu().contiguous()
    save_file(tensors, _experts_file(checkpoint, placed.ep_rank))


def load_placed(
    engine: Any,
    load: Callable[..., tuple[str | None, Any]],
    load_dir: str,
    tag: str | None,
    *,
    load_optimizer_states: bool = True,
    load_module_only: bool = False,
    **kwargs: Any,
) -> tuple[str | None, Any]:
    """`DeepSpeedEngine.load_checkpoint` for placed experts.

    Args:
        engine: With `placed_experts`.
        load: DeepSpeed's own.
        load_dir: As in DeepSpeed.
        tag: As in DeepSpeed; None means `latest`.
        load_optimizer_states: As in DeepSpeed.
        load_module_only: As in DeepSpeed.
        **kwargs: Passed on.

    Raises:
        CheckpointError: The checkpoint was not written under a plan, is incomplete, or its
            optimizer state cannot be moved.
    """
    if engine.load_universal_checkpoint():
        # DeepSpeed restores weights with the optimizer's state here, whatever it is asked for.
        with universal_experts(engine, load_dir, tag):
            return load(load_dir, tag, **kwargs)
    latest = Path(load_dir, "latest")
    if tag is None and latest.is_file():
        tag = latest.read_text().strip()
    if tag is None:
        return load(load_dir, tag, **kwargs)
    checkpoint = Path(load_dir, str(tag))
    old = Descriptor.read(checkpoint)
    if engine.replanning is not None and engine.replanning.moves_experts:
        _go_on_under(engine, old.layout)
    new = Descriptor.of(engine)
    moved = not old.layout.equals(new.layout)
    if moved and not engine.placed_experts.experts:
        raise CheckpointError(
            explain(
                "deepspeed.moe layers are stored by slot, and resume under their own plan only",
                where=str(checkpoint / DESCRIPTOR),
                do="Resume with the plan and the ranks of the run that wrote it",
            )
        )
    with_state = load_optimizer_states and not load_module_only
    if PARTITIONED in (old.zero_stage, new.zero_stage):
        _check_stage(old, new, checkpoint)
        if moved or not with_state:
            return _load_pieces(
                engine, load, load_dir, tag, old, with_state, load_module_only, **kwargs
            )
    move_state = moved and with_state
    if move_state:
        check_can_move(engine, old.zero_stage)
    engine.placed_experts_to_load = (
        {}
        if new.zero_stage == PARTITIONED
        else _local_experts(engine, checkpoint, old.layout.placement)
    )
    try:
        path, client_state = load(
            load_dir,
            tag,
            load_optimizer_states=load_optimizer_states and not moved,
            load_module_only=load_module_only,
            **kwargs,
        )
    finally:
        del engine.placed_experts_to_load
    if move_state:
        move_optimizer_state(engine, checkpoint, old.layout, old.parameters)
    return path, client_state


def _load_pieces(
    engine: Any,
    load: Callable[..., tuple[str | None, Any]],
    load_dir: str,
    tag: str,
    old: Descriptor,
    with_state: bool,
    load_module_only: bool,
    **kwargs: Any,
) -> tuple[str | None, Any]:
    """At ZeRO 3, let DeepSpeed load all but what is in pieces, and put these together anew."""
    if with_state:
        check_can_move(engine, old.zero_stage)
    engine.loads_without_pieces = True
    engine.placed_experts_to_load = {}
    try:
        path, client_state = load(load_dir, tag, load_module_only=load_module_only, **kwargs)
    finally:
        engine.loads_without_pieces = False
        del engine.placed_experts_to_load
    move_optimizer_state(
        engine, Path(load_dir, tag), old.layout, old.parameters, weights_only=not with_state
    )
    return path, client_state


def _check_stage(old: Descriptor, new: Descriptor, checkpoint: Path) -> None:
    """ZeRO 3 stores weights in the optimizer's shards alone, and other stages with the model."""
    if old.zero_stage == new.zero_stage:
        return
    raise CheckpointError(
        explain(
            "a checkpoint of ZeRO 3 has its weights in pieces, and one of another stage has not",
            where=f"{checkpoint}, and zero_optimization.stage",
            got=f"saved at ZeRO {old.zero_stage}, loaded at ZeRO {new.zero_stage}",
            do="Resume at the stage of the run that wrote it; or convert it with semantic-ep "
            "convert --from deepspeed --to universal and set checkpoint.load_universal",
        )
    )


def _go_on_under(engine: Any, old: OldLayout) -> None:
    """Take over the placement of a checkpoint, which an earlier decision may have made.

    Experts are not exchanged: all of them are about to be loaded.
    """
    placed: PlacedExperts = engine.placed_experts
    # No decision gives a run copies of experts that its plan has not, or takes them away.
    shapes = [
        (p.physical_to_logical_map.shape, p.has_replicas) for p in (old.placement, placed.placement)
    ]
    if shapes[0] == shapes[1] and old.expert_parallel == placed.groups.expert_parallel:
        engine.placed_experts = placed.under(old.placement)


def write_latest(save_dir: Path, tag: str) -> None:
    """Make a checkpoint the one to resume from."""
    write_file_atomically(save_dir / "latest", tag.encode())


def _local_experts(engine: Any, checkpoint: Path, old: Placement) -> Mapping[str, Tensor]:
    """[S, ...] values of this rank's expert parameters, by name."""
    from safetensors import SafetensorError, safe_open

    placed: PlacedExperts = engine.placed_experts
    files: dict[int, Any] = {}
    state = {}
    for name, layer, parameter in placed.parameters(engine.module):
        rows = torch.zeros_like(parameter.data)
        for slot, expert in enumerate(placed.held_S(layer).tolist()):
            if expert < 0:
                continue
            rank = int(old.rank_of_expert[layer, expert])
            file = _experts_file(checkpoint, rank)
            try:
                if rank not in files:
                    files[rank] = safe_open(file, framework="pt")
                rows[slot] = files[rank].get_tensor(f"{name}.{expert}")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    explain(f"cannot read expert {expert} of {name}: {error}", where=str(file))
                ) from error
        state[name] = rows
    return state


def _experts_file(checkpoint: Path, ep_rank: int) -> Path:
    return checkpoint / f"experts-{ep_rank:05d}.safetensors"
