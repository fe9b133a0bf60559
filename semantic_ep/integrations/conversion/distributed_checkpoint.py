"""Read and write Megatron's distributed checkpoints (`torch_dist`) one tensor at a time.

They are checkpoints of `torch.distributed.checkpoint` with two more files: metadata.json names the
format, common.pt holds what is not a tensor. Neither direction needs a process group.
"""

from __future__ import annotations

import dataclasses
import io
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import planner as planning
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from semantic_ep.errors import CheckpointError, explain

LATEST = "latest_checkpointed_iteration.txt"
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a global tensor that is written as one.

    Attributes:
        key: Name of the global tensor.
        size: Shape of the global tensor.
        offset: Where the part begins.
        extent: Shape of the part.
        dtype: Of the tensor.
        make: Gives the part, when it is its turn.
    """

    key: str
    size: tuple[int, ...]
    offset: tuple[int, ...]
    extent: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def write_checkpoint(
    directory: Path, pieces: Sequence[Piece], empty: Sequence[str], common: dict[str, Any]
) -> None:
    """Write one checkpoint; memory stays at the largest piece.

    Args:
        directory: Of this iteration; must exist.
        pieces: Together they cover their global tensors.
        empty: Keys of extra states that modules ask for and that hold nothing.
        common: What goes to common.pt.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # On purpose.
        dcp.save(
            {},
            storage_writer=dcp.FileSystemWriter(directory),
            planner=_LazyPlanner(pieces, empty),
            no_dist=True,
        )
    torch.save(common, directory / "common.pt")
    (directory / "metadata.json").write_text(json.dumps(_FORMAT))


class _LazyPlanner(planning.SavePlanner):
    def __init__(self, pieces: Sequence[Piece], empty: Sequence[str]) -> None:
        self._pieces = {(piece.key, piece.offset): piece for piece in pieces}
        self._empty = empty

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        pass

    def create_local_plan(self) -> planning.SavePlan:
        items = [
            planning.WriteItem(index=MetadataIndex(key), type=planning.WriteItemType.BYTE_IO)
            for key in self._empty
        ]
        for piece in self._pieces.values():
            chunk = ChunkStorageMetadata(
                offsets=torch.Size(piece.offset), sizes=torch.Size(piece.extent)
            )
            data = planning.TensorWriteData(
                chunk=chunk,
                properties=TensorProperties(dtype=piece.dtype),
                size=torch.Size(piece.size),
            )
            items.append(
                planning.WriteItem(
                    index=MetadataIndex(piece.key, chunk.offsets),
                    type=planning.WriteItemType.SHARD,
                    tensor_data=data,
                )
            )
        return planning.SavePlan(items)

    def create_global_plan(self, all_plans: list[planning.SavePlan]) -> Any:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: planning.SavePlan) -> planning.SavePlan:
        return new_plan

    def resolve_data(self, write_item: planning.WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == planning.WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save([None], stream)
            return stream
        piece = self._pieces[write_item.index.fqn, tuple(write_item.index.offset or ())]
        return piece.make().reshape(piece.extent).contiguous()


class DistributedCheckpoint:
    """One iteration of a Megatron checkpoint, opened for reading parts of its tensors."""

    def __init__(self, directory: Path) -> None:
        """Open.

        Args:
            directory: Of one iteration, or of a run: then its latest iteration.

        Raises:
            CheckpointError: There is no `torch_dist` checkpoint.
        """
        self.directory = _iteration(directory)
        self._reader = dcp.FileSystemReader(self.directory)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        try:
            self.arguments = dict(self._common()["args"])
        except Exception as error:
            raise CheckpointError(
                explain(
                    "the checkpoint does not record its arguments as plain values",
                    where=str(self.directory),
                    got=f"{type(error).__name__}: {error}",
                    allowed="args: argument names to values or strings, "
                    "as launch/finetune_megatron.py writes",
                )
            ) from error

    def _common(self) -> Any:
        """What is no tensor: in a file of its own, or since 0.19 among the tensors."""
        if (self.directory / "common.pt").is_file():
            return torch.load(self.directory / "common.pt", weights_only=True)
        keys = [k for k in self._metadata.state_dict_metadata if k.startswith("common_state/")]
        content = _Bytes()
        items = [
            planning.ReadItem(
                type=planning.LoadItemType.BYTE_IO,
                dest_index=MetadataIndex(key),
                dest_offsets=torch.Size((0,)),
                storage_index=MetadataIndex(key),
                storage_offsets=torch.Size((0,)),
                lengths=torch.Size((0,)),
            )
            for key in keys
        ]
        self._reader.read_data(planning.LoadPlan(items), content).wait()
        return torch.load(content.stream, weights_only=True)[0]

    def tensor(self, key: str) -> TensorStorageMetadata | None:
        """Shape and dtype of a global tensor; None if there is none of this name."""
        found = self._metadata.state_dict_metadata.get(key)
        return found if isinstance(found, TensorStorageMetadata) else None

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """Read a tensor, or its part at `index` along the first axes."""
        stored = self._metadata.state_dict_metadata[key]
        rest = stored.size[len(index) :]
        offset = torch.Size((*index, *(0 for _ in rest)))
        size = torch.Size((*(1 for _ in index), *rest))
        whole = torch.empty(size, dtype=stored.properties.dtype)
        chunk = ChunkStorageMetadata(offsets=offset, sizes=size)
        items = create_read_items_for_chunk_list(key, stored, [chunk])
        self._reader.read_data(planning.LoadPlan(items), _Into(whole)).wait()
        return whole.reshape(rest)


class _Bytes(DefaultLoadPlanner):
    """Reads an object."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = io.BytesIO()

    def load_bytes(self, read_item: planning.ReadItem, value: io.BytesIO) -> None:
        self.stream = value


class _Into(DefaultLoadPlanner):
    """Reads into one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._tensor = tensor

    def resolve_tensor(self, read_item: planning.ReadItem) -> Tensor:
        part = self._tensor
        for axis, (begin, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            part = part.narrow(axis, begin, length)
        return part


def _iteration(directory: Path) -> Path:
    chosen = directory
    if (directory / LATEST).is_file():
        name = (directory / LATEST).read_text().strip()
        chosen = directory / (f"iter_{int(name):07d}" if name.isdecimal() else name)
    try:
        form = json.loads((chosen / "metadata.json").read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError):
        form = None
    if form != "torch_dist" or not (chosen / ".metadata").is_file():
        raise CheckpointError(
            explain(
                "this is no distributed checkpoint of Megatron",
                where=str(chosen),
                got=form,
                allowed="torch_dist",
                do=f"Give a directory with {LATEST}, or that of an iteration with metadata.json",
            )
        )
    return chosen
