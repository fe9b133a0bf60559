"""Permute the experts of a Hugging Face checkpoint, and undo it.

The rewrite moves contents, never structure: every shard keeps its name and its header byte for
byte, so index, dtypes, shapes, offsets and metadata stay as they were, and a shard of the output
is a sequence of byte ranges of the input. That holds for fused and per-expert tensors alike.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from semantic_ep.apply.checkpoint.reader import CONFIG, Checkpoint, TensorEntry, read_json, reading
from semantic_ep.apply.checkpoint.writer import (
    Progress,
    Segment,
    check_space,
    check_vacant,
    coalesce,
    new_directory,
    write_segments,
)
from semantic_ep.apply.layout import Layout, relayout
from semantic_ep.artifacts import write_file_atomically
from semantic_ep.errors import CheckpointError, explain

logger = logging.getLogger(__name__)

LAYOUT_DIRECTORY = "semantic_ep_layout"
CONFIG_KEY = "semantic_ep_layout"
# Weights that the rewrite cannot permute; beside a permuted model they would be a trap.
_OTHER_WEIGHTS = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}
)
_METADATA_DIRECTORIES = frozenset({".git", ".cache"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewriteSummary:
    """What a rewrite did, or would do in a dry run.

    Attributes:
        output: Directory written.
        shards: Safetensors files.
        bytes: Size of all files.
        layers: MoE layers (L).
        experts: Logical experts a layer (E).
        moved: Experts, over all layers, whose slot differs before and after.
        left_out: Names not taken along: weights in forms that are not permuted, optimiser states
            among them, and links that lead to no file.
    """

    output: Path
    shards: int
    bytes: int
    layers: int
    experts: int
    moved: int
    left_out: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rewrite:
    """Everything decided before the first byte is written."""

    output: Path
    files: Mapping[str, list[Segment]]
    summary: RewriteSummary


def apply_layout(
    source: Path,
    layout: Layout,
    output: Path,
    *,
    plan_sha256: str = "",
    allow_retrained: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> RewriteSummary:
    """Write `source` with its experts in the order of `layout`, and record the layout inside.

    Args:
        source: Hugging Face checkpoint directory in logical expert order.
        layout: New order; its fingerprint is the model that was planned for.
        output: Directory to create.
        plan_sha256: Hash of the plan artefact, recorded as the parent of the layout.
        allow_retrained: Accept router weights that changed since the plan was made.
        dry_run: Check everything, write nothing.
        progress: Called with the bytes of each write and of the whole rewrite.

    Raises:
        CheckpointError: The source is incomplete, corrupt or already permuted, or the output
            cannot be written.
        FingerprintError: The layout is for another model.
        PlacementError: The router's groups make the layout illegal.
    """
    checkpoint = Checkpoint.open(source)
    if CONFIG_KEY in checkpoint.config or (source / LAYOUT_DIRECTORY).exists():
        raise CheckpointError(
            explain(
                "a plan was already applied to this checkpoint",
                where=str(source),
                do="Apply to the original, or restore it first: semantic-ep apply --undo "
                f"--checkpoint {source} -o DIR",
            )
        )
    fingerprint = checkpoint.fingerprint()
    fingerprint.check(layout.fingerprint, what="the plan", allow_retrained=allow_retrained)
    layout.check_router(checkpoint.shape.router_groups)
    identity = Layout.identity(fingerprint)
    rewrite = _prepare(checkpoint, relayout(identity, layout), output)
    if dry_run:
        return rewrite.summary
    with new_directory(output) as directory:
        digests = _write_files(rewrite, directory, progress)
        with reading(source / CONFIG):
            original = (source / CONFIG).read_bytes()
        recorded = dataclasses.replace(
            layout,
            fingerprint=fingerprint,
            meta={"files": digests, CONFIG: original.decode("utf-8")},
        )
        parents = {"plan": plan_sha256} if plan_sha256 else None
        sha256 = recorded.save(directory / LAYOUT_DIRECTORY, parents)
        write_file_atomically(directory / CONFIG, _marked_config(original, sha256))
    return rewrite.summary


def undo_layout(
    source: Path,
    output: Path,
    *,
    allow_retrained: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> RewriteSummary:
    """Write a permuted checkpoint back in logical expert order.

    Args:
        source: Directory that `apply_layout` wrote, or a model trained from one, with the
            layout directory copied to it.
        output: Directory to create. It equals the original byte for byte unless files changed.
        allow_retrained: Accept files that changed since the plan was applied.
        dry_run: Check everything, write nothing.
        progress: Called with the bytes of each write and of the whole rewrite.

    Raises:
        CheckpointError: No layout is recorded, or files changed since it was applied.
    """
    layout = _recorded_layout(source)
    checkpoint = Checkpoint.open(source)
    fingerprint = dataclasses.replace(checkpoint.fingerprint(), tokenizer_sha256="")
    fingerprint.check(layout.fingerprint, what="the recorded layout", allow_retrained=True)
    identity = Layout.identity(layout.fingerprint)
    rewrite = _prepare(checkpoint, relayout(layout, identity), output)
    if not allow_retrained:
        logger.info("checking that %s is as it was written", source)
        _check_unchanged(source, layout.meta["files"])
    if dry_run:
        return rewrite.summary
    with new_directory(output) as directory:
        _write_files(rewrite, directory, progress)
        write_file_atomically(directory / CONFIG, _unmarked_config(source / CONFIG, layout))
        if not allow_retrained:
            Checkpoint.open(directory).fingerprint().check(
                layout.fingerprint, what="the restored checkpoint"
            )
    return rewrite.summary


def _prepare(checkpoint: Checkpoint, source_of_slot_LE: np.ndarray, output: Path) -> _Rewrite:
    source = checkpoint.directory
    check_vacant(output)
    if output.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(
            explain(
                "the output is inside the source",
                where=str(output),
                do="Choose a directory beside it with -o",
            )
        )
    files = _shard_segments(checkpoint, source_of_slot_LE)
    left_out = []
    for name in _other_files(checkpoint):
        file = source / name
        if file.suffix in _OTHER_WEIGHTS or not file.is_file():
            left_out.append(name)
        else:
            files[name] = [Segment(file=file, begin=0, end=file.stat().st_size)]
    size = sum(part.end - part.begin for segments in files.values() for part in segments)
    check_space(output, size)
    slots = np.arange(checkpoint.shape.num_experts)
    return _Rewrite(
        output=output,
        files=files,
        summary=RewriteSummary(
            output=output,
            shards=len(checkpoint.shards),
            bytes=size,
            layers=len(checkpoint.shape.layer_ids),
            experts=checkpoint.shape.num_experts,
            moved=int((source_of_slot_LE != slots).sum()),
            left_out=tuple(left_out),
        ),
    )


def _shard_segments(
    checkpoint: Checkpoint, source_of_slot_LE: np.ndarray
) -> dict[str, list[Segment]]:
    """Where the bytes of each output shard come from."""
    source_of_slot = dict(zip(checkpoint.shape.layer_ids, source_of_slot_LE.tolist(), strict=True))
    holders: dict[tuple[str, int], TensorEntry] = {
        (tensor.part, tensor.expert): checkpoint.tensors[name]
        for name, tensor in checkpoint.experts.items()
        if tensor.expert is not None
    }
    files = {}
    for shard in checkpoint.shards:
        segments = [Segment(file=shard.file, begin=0, end=shard.data_begin)]
        for entry in shard.tensors:
            expert = checkpoint.experts.get(entry.name)
            if expert is None:
                segments.append(Segment(file=entry.file, begin=entry.begin, end=entry.end))
            elif expert.expert is None:
                segments += _rows(entry, source_of_slot[expert.layer])
            else:
                moved = source_of_slot[expert.layer][expert.expert]
                segments.append(_exchange(entry, holders[expert.part, moved]))
        files[shard.file.name] = coalesce(segments)
    return files


def _rows(entry: TensorEntry, order: list[int]) -> Iterator[Segment]:
    """The rows of a tensor along its first axis, in another order."""
    size = (entry.end - entry.begin) // entry.shape[0]
    for row in order:
        begin = entry.begin + row * size
        yield Segment(file=entry.file, begin=begin, end=begin + size)


def _exchange(entry: TensorEntry, holder: TensorEntry) -> Segment:
    """The contents of `holder`, to be stored under the name and header of `entry`."""
    if (entry.dtype, entry.shape) != (holder.dtype, holder.shape):
        raise CheckpointError(
            explain(
                f"{entry.name} and {holder.name} differ in dtype or shape, so that their "
                "experts cannot change places",
                where=str(entry.file),
                got=f"{entry.dtype}{list(entry.shape)} and {holder.dtype}{list(holder.shape)}",
                do="Quantise all experts of a layer alike, or serve the plan inside an integration",
            )
        )
    return Segment(file=holder.file, begin=holder.begin, end=holder.end)


def _write_files(rewrite: _Rewrite, directory: Path, progress: Progress | None) -> dict[str, str]:
    """Write all planned files; returns name -> sha256."""

    def advance(count: int) -> None:
        if progress is not None:
            progress(count, rewrite.summary.bytes)

    digests = {}
    for name, segments in rewrite.files.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        digests[name] = write_segments(target, segments, progress=advance)
    return digests


def _other_files(checkpoint: Checkpoint) -> Iterator[str]:
    """Names besides config, shards and layout, relative; links to directories are not followed."""
    written_apart = {CONFIG, *(shard.file.name for shard in checkpoint.shards)}
    for parent, directories, names in os.walk(checkpoint.directory, onerror=_refuse):
        relative = Path(parent).relative_to(checkpoint.directory)
        skipped = set(_METADATA_DIRECTORIES)
        if relative == Path("."):
            skipped.add(LAYOUT_DIRECTORY)
            names = [name for name in names if name not in written_apart]
        names += [name for name in directories if (Path(parent) / name).is_symlink()]
        directories[:] = sorted(set(directories) - skipped)
        yield from (str(relative / name) for name in sorted(names))


def _refuse(error: OSError) -> None:
    with reading(Path(error.filename)):
        raise error


def _marked_config(original: bytes, layout_sha256: str) -> bytes:
    """The config with a mark that survives loading and saving by transformers."""
    config = {**json.loads(original), CONFIG_KEY: {"sha256": layout_sha256}}
    return (json.dumps(config, indent=2) + "\n").encode()


def _unmarked_config(file: Path, layout: Layout) -> bytes:
    """The original config; if it was edited since, the edited one without the mark."""
    with reading(file):
        original, found = str(layout.meta[CONFIG]).encode(), file.read_bytes()
    if found == _marked_config(original, layout.sha256):
        return original
    logger.warning("%s was edited after the plan was applied; the edits are kept", file)
    config: dict[str, Any] = json.loads(found)
    config.pop(CONFIG_KEY, None)
    return (json.dumps(config, indent=2) + "\n").encode()


def _recorded_layout(source: Path) -> Layout:
    directory = source / LAYOUT_DIRECTORY
    config = source / CONFIG
    marked = config.is_file() and CONFIG_KEY in read_json(config)
    if not directory.exists():
        raise CheckpointError(
            explain(
                f"{LAYOUT_DIRECTORY}/ is missing, and only it says how to undo the plan"
                if marked
                else "no plan was applied to this checkpoint",
                where=str(source),
                do=f"Copy {LAYOUT_DIRECTORY}/ from the checkpoint that this one was trained from"
                if marked
                else "Give the directory that semantic-ep apply wrote",
            )
        )
    layout = Layout.read(directory)
    if marked and read_json(config)[CONFIG_KEY] != {"sha256": layout.sha256}:
        raise CheckpointError(
            explain(
                f"{LAYOUT_DIRECTORY}/ belongs to another checkpoint than {CONFIG}",
                where=str(source),
                got=layout.sha256[:12],
                allowed=str(read_json(config)[CONFIG_KEY]),
                do="Copy both from the checkpoint that semantic-ep apply wrote",
            )
        )
    return layout


def _check_unchanged(source: Path, digests: Mapping[str, str]) -> None:
    for name, expected in digests.items():
        file = source / name
        with reading(file), file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != expected:
            raise CheckpointError(
                explain(
                    "the file changed since the plan was applied, so that undo would not restore "
                    "the original",
                    where=str(file),
                    got=f"sha256 {found[:12]}…",
                    allowed=f"sha256 {expected[:12]}…",
                    do="Copy it again, or pass --allow-retrained if the model was trained since",
                )
            )
