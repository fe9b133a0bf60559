"""Write a directory that appears whole or not at all, from pieces of existing files.

Everything goes to a hidden sibling of the target that is renamed at the end. Any error removes
it; after a crash that leaves no chance to (SIGKILL, power), the next write to the same target
does, which the lock on a living writer's directory makes safe.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from semantic_ep.apply.checkpoint.reader import reading
from semantic_ep.errors import CheckpointError, explain

# Small enough that what was read is still in the cache when it is hashed and written.
BUFFER_BYTES = 1 << 20
Progress = Callable[[int, int], object]
"""Called with the bytes of each write, and the bytes of the whole rewrite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """Bytes `begin` .. `end` - 1 of a file."""

    file: Path
    begin: int
    end: int


def coalesce(segments: Iterable[Segment]) -> list[Segment]:
    """Join neighbours that are adjacent in one file, and drop empty ones."""
    joined: list[Segment] = []
    for segment in segments:
        if segment.begin == segment.end:
            continue
        if joined and joined[-1].file == segment.file and joined[-1].end == segment.begin:
            segment = dataclasses.replace(segment, begin=joined.pop().begin)
        joined.append(segment)
    return joined


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yield a directory to fill, and make it `target` when the block ends without an error.

    Raises:
        CheckpointError: The target exists, or the system refused a write; nothing is left behind.
    """
    check_vacant(target)
    temporary = target.parent / f"{_partial_prefix(target)}{secrets.token_hex(6)}"
    lock = -1
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        temporary.mkdir()
        lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
        _try_lock(lock)
        yield temporary
        for directory, _, _ in os.walk(temporary):
            _sync_directory(Path(directory))
        os.rename(temporary, target)
        # From here on the target is whole; only its survival of a power cut is still open.
        with suppress(OSError):
            _sync_directory(target.parent)
    except OSError as error:
        raise CheckpointError(
            explain(
                f"cannot write the checkpoint: {error.strerror or error}",
                where=str(target),
                do="Free space or choose a writable directory; nothing half-written remains",
            )
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock >= 0:
            os.close(lock)


def check_vacant(target: Path) -> None:
    """Raise `CheckpointError` unless `target` is absent or an empty directory."""
    if target.is_symlink() or (target.exists() and not _is_empty_directory(target)):
        raise CheckpointError(
            explain(
                "the output exists",
                where=str(target),
                do="Choose another directory with -o, or remove it; nothing was overwritten",
            )
        )


def check_space(target: Path, needed: int) -> None:
    """Raise `CheckpointError` if the file system of `target` has fewer than `needed` bytes free."""
    existing = next(path for path in (target, *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(
            explain(
                "there is no space for the checkpoint",
                where=str(target),
                got=f"{free / 1e9:.3f} GB free",
                allowed=f"at least {needed / 1e9:.3f} GB",
                do="Free space or choose another file system with -o; nothing was written",
            )
        )


def write_segments(
    target: Path, segments: Iterable[Segment], *, progress: Callable[[int], object]
) -> str:
    """Write a new file that is the concatenation of `segments`, flushed to disk.

    Memory stays at one buffer of `BUFFER_BYTES` whatever the sizes.

    Returns:
        sha256 of what was written.

    Raises:
        CheckpointError: A source ended early or cannot be read.
        OSError: The target cannot be written.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(BUFFER_BYTES))
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    opened: tuple[Path, int] | None = None
    try:
        for segment in segments:
            if opened is None or opened[0] != segment.file:
                if opened is not None:
                    os.close(opened[1])
                    opened = None
                opened = (segment.file, _open_source(segment.file))
            position = segment.begin
            while position < segment.end:
                chunk = buffer[: min(BUFFER_BYTES, segment.end - position)]
                count = _read_at(opened[1], chunk, position, segment.file)
                digest.update(chunk[:count])
                _write_all(out, chunk[:count])
                position += count
                progress(count)
        os.fsync(out)
    finally:
        os.close(out)
        if opened is not None:
            os.close(opened[1])
    return digest.hexdigest()


def _open_source(file: Path) -> int:
    with reading(file):
        return os.open(file, os.O_RDONLY)


def _read_at(descriptor: int, chunk: memoryview, position: int, file: Path) -> int:
    with reading(file):
        count = os.preadv(descriptor, [chunk], position)
    if count == 0:
        raise CheckpointError(
            explain(
                f"the source ended at byte {position} while it was read",
                where=str(file),
                do="Do not change a checkpoint while it is applied; nothing was written",
            )
        )
    return count


def _write_all(descriptor: int, content: memoryview) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _partial_prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _try_lock(descriptor: int) -> bool:
    """Lock without waiting; False where another holds it or the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_abandoned(target: Path) -> None:
    """Remove what a killed writer of the same target left."""
    for path in target.parent.iterdir():
        if not path.name.startswith(_partial_prefix(target)):
            continue
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if _try_lock(descriptor):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
