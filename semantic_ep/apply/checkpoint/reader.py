"""Open a Hugging Face checkpoint without loading it: config, index, and where each tensor lies.

Tensor data is never interpreted here except for router weights, which identify the model, and the
token embedding; so every dtype that safetensors knows (bf16, fp8, packed fp4, integers) is handled
alike.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from semantic_ep.apply.families import ExpertTensor, ModelFamily, MoEShape, family_of
from semantic_ep.artifacts import ModelFingerprint, hash_arrays
from semantic_ep.errors import CheckpointError, explain

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        name: Name in the checkpoint.
        file: Shard that holds it.
        dtype: safetensors dtype, e.g. "BF16".
        shape: As in the header.
        begin: Offset of its first byte in the file.
        end: Offset after its last byte.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One safetensors file: the length of its header, and its tensors in the order of their data.

    Attributes:
        file: The file.
        data_begin: Offset of the first byte after the header.
        tensors: They fill the rest of the file without gap or overlap.
    """

    file: Path
    data_begin: int
    tensors: tuple[TensorEntry, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint directory whose headers were read and checked.

    Attributes:
        directory: Where it is.
        config: Contents of config.json.
        family: Row of the family table.
        shape: Layers, experts and router groups.
        shards: All safetensors files that the model consists of.
    """

    directory: Path
    config: Mapping[str, Any]
    family: ModelFamily
    shape: MoEShape
    shards: tuple[Shard, ...]

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Read config, index and headers.

        Raises:
            CheckpointError: Saying which file is missing, corrupt or contradicts another.
        """
        config = read_json(directory / CONFIG)
        family = family_of(config)
        shards = tuple(_read_shard(file) for file in _shard_files(directory))
        checkpoint = cls(
            directory=directory,
            config=config,
            family=family,
            shape=family.shape(config),
            shards=shards,
        )
        checkpoint._check_index()
        return checkpoint

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """All tensors by name."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @cached_property
    def experts(self) -> dict[str, ExpertTensor]:
        """Tensors that carry experts of the MoE layers, by name, complete and consistent."""
        found = {}
        layers = set(self.shape.layer_ids)
        for name in self.tensors:
            tensor = self.family.expert_tensor(name)
            if tensor is not None and tensor.layer in layers:
                found[name] = tensor
            elif tensor is not None and tensor.layer < self.shape.num_layers:
                raise CheckpointError(
                    explain(
                        f"tensor {name} holds experts, but layer {tensor.layer} is dense",
                        where=str(self.directory / CONFIG),
                        do="Use the config.json that belongs to this checkpoint",
                    )
                )
        self._check_complete(found)
        return found

    @cached_property
    def routers(self) -> list[TensorEntry]:
        """Router weights in layer order."""
        weights = {
            tensor.layer: self.tensors[name]
            for name, tensor in self.experts.items()
            if tensor.router and name.endswith(".weight")
        }
        return [weights[layer] for layer in self.shape.layer_ids]

    def fingerprint(self) -> ModelFingerprint:
        """Identify the model; see `checkpoint_fingerprint`."""
        tokenizer = self.directory / TOKENIZER
        content = b""
        if tokenizer.is_file():
            with reading(tokenizer):
                content = tokenizer.read_bytes()
        return ModelFingerprint(
            architecture=self.shape.model_type,
            layer_ids=self.shape.layer_ids,
            num_experts=self.shape.num_experts,
            top_k=self.shape.top_k,
            router_sha256=hash_arrays(read_float32(entry) for entry in self.routers),
            tokenizer_sha256=hashlib.sha256(content).hexdigest() if content else "",
        )

    def _check_index(self) -> None:
        counted = sum(len(shard.tensors) for shard in self.shards)
        if counted != len(self.tensors):
            names = Counter(tensor.name for shard in self.shards for tensor in shard.tensors)
            twice = names.most_common(1)[0][0]
            raise CheckpointError(
                explain(f"tensor {twice} is in two shards", where=str(self.directory))
            )
        if (self.directory / SINGLE).is_file():
            return
        for name, file in _weight_map(self.directory).items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise CheckpointError(
                    explain(
                        f"the index says that tensor {name} is in {file}, and it is not",
                        where=str(self.directory / INDEX),
                        do="Download or save the checkpoint again",
                    )
                )

    def _check_complete(self, found: Mapping[str, ExpertTensor]) -> None:
        experts = self.shape.num_experts
        held: dict[str, set[int]] = {}
        for name, tensor in found.items():
            if tensor.expert is None:
                self._check_rows(self.tensors[name])
            else:
                held.setdefault(tensor.part, set()).add(tensor.expert)
        for part, numbers in held.items():
            if numbers != set(range(experts)):
                odd = sorted(numbers ^ set(range(experts)))[:8]
                raise CheckpointError(
                    explain(
                        f"{part} must exist for the experts 0..{experts - 1}",
                        where=str(self.directory),
                        got=f"missing or unexpected: {odd}",
                        do="Download or save the checkpoint again",
                    )
                )
        routed = {
            tensor.layer
            for name, tensor in found.items()
            if tensor.router and name.endswith(".weight")
        }
        whole = routed & {tensor.layer for tensor in found.values() if not tensor.router}
        for layer in self.shape.layer_ids:
            if layer not in whole:
                raise CheckpointError(
                    explain(
                        f"layer {layer} of this {self.shape.model_type} lacks its router weight or "
                        "its experts",
                        where=str(self.directory),
                        do="Check that config.json belongs to these weights",
                    )
                )

    def _check_rows(self, entry: TensorEntry) -> None:
        if not entry.shape or entry.shape[0] != self.shape.num_experts:
            raise CheckpointError(
                explain(
                    f"the first axis of {entry.name} is not the expert",
                    where=str(entry.file),
                    got=f"shape {list(entry.shape)}",
                    allowed=f"[{self.shape.num_experts}, ...]",
                    do="Convert the checkpoint to the layout of transformers 5 first",
                )
            )


def checkpoint_fingerprint(directory: Path) -> ModelFingerprint:
    """Identify the model in a Hugging Face checkpoint directory, without torch.

    The router hash covers the weights as stored, widened to float32; a model loaded at another
    precision has another hash.

    Raises:
        CheckpointError: The checkpoint is missing pieces, corrupt or of an unknown family.
    """
    return Checkpoint.open(directory).fingerprint()


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn the system's refusal to read a file of a checkpoint into a `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            explain(
                f"cannot read this file of a Hugging Face checkpoint: {error.strerror or error}",
                where=str(file),
                do="Give a readable directory with config.json and *.safetensors; nothing was "
                "written",
            )
        ) from error


def read_shape(config: Path) -> MoEShape:
    """MoE layers, experts and router groups of a model.

    Args:
        config: Its config.json, or the directory that holds it.

    Raises:
        CheckpointError: The file is unreadable, or of an unknown family.
    """
    content = read_json(config / CONFIG if config.is_dir() else config)
    return family_of(content).shape(content)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint; `CheckpointError` if the file does not hold one."""
    try:
        with reading(file):
            content = json.loads(file.read_bytes().decode("utf-8"))
    except ValueError as error:
        raise CheckpointError(
            explain(
                "the file is truncated or is not JSON",
                where=str(file),
                got=f"{type(error).__name__}: {error}",
                do="Download or save the checkpoint again",
            )
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(explain("the file holds no JSON object", where=str(file)))
    return content


def _weight_map(directory: Path) -> dict[str, str]:
    weight_map = read_json(directory / INDEX).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(
            isinstance(file, str) and Path(file).name == file for file in weight_map.values()
        )
    ):
        raise CheckpointError(
            explain(
                "the index has no weight_map of tensor names to files in this directory",
                where=str(directory / INDEX),
                do="Download or save the checkpoint again",
            )
        )
    return dict(weight_map)


def _shard_files(directory: Path) -> list[Path]:
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if not (directory / INDEX).is_file():
        raise CheckpointError(
            explain(
                f"there is neither {SINGLE} nor {INDEX}",
                where=str(directory),
                got=sorted(file.name for file in directory.glob("*.bin"))[:4] or None,
                do="Save the model with save_pretrained, which writes safetensors",
            )
        )
    files = [directory / name for name in sorted(set(_weight_map(directory).values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            explain(
                f"{len(missing)} of {len(files)} shards are missing: {', '.join(missing[:4])}",
                where=str(directory),
                do="Download or copy the missing files; nothing was written",
            )
        )
    return files


def _read_shard(file: Path) -> Shard:
    """Read and check one header. The library judges it; offsets are ours, as it hides them."""
    from safetensors import SafetensorError, safe_open

    try:
        with reading(file), safe_open(file, framework="np"):
            pass
        with reading(file), file.open("rb") as stream:
            data_begin = 8 + int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(data_begin - 8))
        header.pop("__metadata__", None)
        entries = sorted(
            (
                TensorEntry(
                    name=name,
                    file=file,
                    dtype=tensor["dtype"],
                    shape=tuple(tensor["shape"]),
                    begin=data_begin + tensor["data_offsets"][0],
                    end=data_begin + tensor["data_offsets"][1],
                )
                for name, tensor in header.items()
            ),
            key=lambda entry: (entry.begin, entry.end),
        )
        position = data_begin
        for entry in entries:
            if entry.begin != position:
                raise ValueError(f"tensor {entry.name} does not follow the one before it")
            position = entry.end
        if position != file.stat().st_size:
            raise ValueError(f"data ends at byte {position} of {file.stat().st_size}")
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            explain(
                "the safetensors file is truncated or corrupt",
                where=str(file),
                got=str(error),
                do="Download or save this file again; nothing was written",
            )
        ) from error
    return Shard(file=file, data_begin=data_begin, tensors=tuple(entries))


def read_float32(entry: TensorEntry) -> np.ndarray:
    """Read a tensor of floats whole; raises CheckpointError for another dtype."""
    if entry.dtype not in _FLOATS:
        raise CheckpointError(
            explain(
                f"{entry.name} has a dtype that is not read as numbers",
                where=str(entry.file),
                got=entry.dtype,
                allowed=sorted(_FLOATS),
            )
        )
    with reading(entry.file), entry.file.open("rb") as stream:
        stream.seek(entry.begin)
        content = stream.read(entry.end - entry.begin)
    stored = np.frombuffer(content, dtype=_FLOATS[entry.dtype]).reshape(entry.shape)
    if entry.dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)
