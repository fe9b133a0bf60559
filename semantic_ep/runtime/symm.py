"""Symmetric memory: one block of equal size on every rank, which all ranks of a node can address.

Providers behind one interface, so that torch's alpha interface is used in one place only:

* `TorchSymmetricMemory`: `torch.distributed._symmetric_memory`, for NVLink domains;
* `CudaIpcMemory`: CUDA IPC handles, where torch's is missing;
* `PosixSharedMemory`: for CPU ranks in several processes;
* `LocalMemory`: virtual ranks in one process, on one GPU or on the CPU.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import socket
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist

from semantic_ep.errors import BackendError, explain
from semantic_ep.runtime.collectives import from_all_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from semantic_ep.runtime.kernels.abi import CudaLibrary

logger = logging.getLogger(__name__)

_SHM_DIRECTORY = Path("/dev/shm")
_SHM_PREFIX = "semantic_ep-"
_SHM_STALE_S = 60.0
_SHARING = "sharing of memory blocks"


class SymmetricMemory(Protocol):
    """One rank's view of the blocks of all ranks. Blocks start zeroed."""

    @property
    def rank(self) -> int:
        """This rank in the group."""
        ...

    @property
    def num_bytes(self) -> int:
        """Size of a block."""
        ...

    @property
    def pointers(self) -> list[int]:
        """Address of every rank's block, as this process (or its GPU) sees it."""
        ...

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        ...

    def close(self) -> None:
        """Give the memory back. No rank may use a peer's block afterwards; collective."""
        ...


def allocate(
    group: ProcessGroup,
    num_bytes: int,
    device: torch.device,
    cuda_library: CudaLibrary | None = None,
) -> SymmetricMemory:
    """Allocate a block on every rank of the group; collective.

    Args:
        group: Ranks of one node.
        num_bytes: Size of a block, equal on all ranks.
        device: "cpu", or this rank's GPU.
        cuda_library: Needed for CUDA IPC where torch has no symmetric memory.

    Raises:
        BackendError: The ranks are on several machines, or no provider works here.
    """
    require_one_machine(group)
    if device.type == "cpu":
        return PosixSharedMemory(group, num_bytes)
    reason = TorchSymmetricMemory.unavailable_because(device)
    if reason is None:
        return TorchSymmetricMemory(group, num_bytes, device)
    logger.info("torch symmetric memory is not used: %s", reason)
    if cuda_library is None:
        raise BackendError(
            explain("no symmetric memory on this GPU", got=reason, do="Use torch >= 2.10 with CUDA")
        )
    return CudaIpcMemory(group, num_bytes, device, cuda_library)


class LocalMemory:
    """The blocks of all (virtual) ranks in one process."""

    def __init__(self, blocks: list[torch.Tensor], rank: int) -> None:
        self.rank = rank
        self.num_bytes = blocks[0].numel()
        self.pointers = [block.data_ptr() for block in blocks]
        self._blocks: list[torch.Tensor] | None = blocks

    @classmethod
    def create(cls, num_ranks: int, num_bytes: int, device: torch.device) -> list[LocalMemory]:
        """The views of all ranks, in rank order."""
        blocks = [
            torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(num_ranks)
        ]
        return [cls(blocks, rank) for rank in range(num_ranks)]

    def barrier(self) -> None:
        """Nothing to wait for: one process queues the work of all ranks."""

    def close(self) -> None:
        """Drop this rank's references."""
        self._blocks = None


class PosixSharedMemory:
    """Blocks in /dev/shm.

    A block loses its name as soon as every rank has mapped it, so the kernel frees it when the last
    process ends, however that happens. What a crash in between leaves behind is removed by the next
    group on the machine: a name whose creator is alive is locked.
    """

    def __init__(self, group: ProcessGroup, num_bytes: int) -> None:
        self.rank = group.rank()
        self.num_bytes = num_bytes
        self._group = group
        remove_stale_blocks()
        path = _SHM_DIRECTORY / f"{_SHM_PREFIX}{uuid.uuid4().hex}"
        with open(path, "x+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                self._reserve(file.fileno())
                paths = from_all_ranks(str(path), _SHARING, group)
                self._maps = [self._map(name) for name in paths]
                self.barrier()
            finally:
                path.unlink(missing_ok=True)
        self._views = [torch.frombuffer(block, dtype=torch.uint8) for block in self._maps]
        self.pointers = [view.data_ptr() for view in self._views]

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        dist.barrier(group=self._group)

    def close(self) -> None:
        """Unmap all blocks."""
        self.barrier()
        self.pointers = []
        self._views.clear()
        for block in self._maps:
            block.close()

    def _reserve(self, descriptor: int) -> None:
        # Without this a full /dev/shm shows as a bus error at the first write to a page.
        try:
            os.posix_fallocate(descriptor, 0, self.num_bytes)
        except OSError as error:
            raise BackendError(
                explain(
                    f"{_SHM_DIRECTORY} has no room for {self.num_bytes} bytes a rank",
                    got=str(error),
                    do='Enlarge it (docker: --shm-size) or set the dispatch backend to "torch"',
                )
            ) from error

    def _map(self, name: str) -> mmap.mmap:
        with open(name, "r+b") as file:
            return mmap.mmap(file.fileno(), self.num_bytes)


def remove_stale_blocks() -> list[str]:
    """Remove shared-memory blocks whose creator died before unlinking them; returns their names."""
    removed = []
    for path in _SHM_DIRECTORY.glob(f"{_SHM_PREFIX}*"):
        try:
            # A block is locked right after its creation; a young one may not be yet.
            if time.time() - path.stat().st_mtime < _SHM_STALE_S:
                continue
            with open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
        except OSError:  # its creator holds the lock, another user owns it, or it is gone
            continue
        logger.warning("removed shared memory left behind by a dead process: %s", path)
        removed.append(path.name)
    return removed


class TorchSymmetricMemory:
    """Blocks from `torch.distributed._symmetric_memory`, alpha in torch: used here only."""

    def __init__(self, group: ProcessGroup, num_bytes: int, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self.rank = group.rank()
        self.num_bytes = num_bytes
        self._device = device
        self._block = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
        self._block.zero_()
        self._handle = symmetric.rendezvous(self._block, group)
        self.pointers = [int(pointer) for pointer in self._handle.buffer_ptrs]
        self._group = group
        self.barrier()

    @staticmethod
    def unavailable_because(device: torch.device) -> str | None:
        """Why it cannot be used, or None."""
        try:
            import torch.distributed._symmetric_memory as symmetric
        except ImportError as error:
            return f"this build of torch has none ({error})"
        if symmetric.get_backend(device) is None:
            return f"torch has no backend for it on {device}"
        return None

    def barrier(self) -> None:
        """Wait until every rank's stream has come here."""
        torch.cuda.synchronize(self._device)
        dist.barrier(group=self._group)

    def close(self) -> None:
        """Give the block back to torch."""
        self.barrier()
        self.pointers = []
        del self._handle, self._block


class CudaIpcMemory:
    """Blocks from cudaMalloc, mapped by CUDA IPC handles."""

    def __init__(
        self, group: ProcessGroup, num_bytes: int, device: torch.device, library: CudaLibrary
    ) -> None:
        self.rank = group.rank()
        self.num_bytes = num_bytes
        self._group, self._device, self._library = group, device, library
        with torch.cuda.device(device):
            self._own = library.allocate(num_bytes)
            handles = from_all_ranks(library.export(self._own), _SHARING, group)
            self.pointers = [
                self._own if rank == self.rank else library.map(handle)
                for rank, handle in enumerate(handles)
            ]
        self.barrier()

    def barrier(self) -> None:
        """Wait until every rank's stream has come here."""
        torch.cuda.synchronize(self._device)
        dist.barrier(group=self._group)

    def close(self) -> None:
        """Unmap the peers' blocks, then free our own."""
        self.barrier()
        for rank, pointer in enumerate(self.pointers):
            if rank != self.rank:
                self._library.unmap(pointer)
        self.barrier()
        self._library.free(self._own)
        self.pointers = []


def require_one_machine(group: ProcessGroup) -> None:
    """Raise `BackendError`, on every rank, unless the group is on one machine; collective."""
    hosts = from_all_ranks(_machine(), "gathering of host names", group)
    if len(set(hosts)) > 1:
        raise BackendError(
            explain(
                "symmetric memory needs all ranks of the EP group on one machine",
                where="semantic_ep.groups.scope, --semantic-ep-groups-scope",
                got=", ".join(sorted(set(hosts))),
                do='Set it to "node", or semantic_ep.dispatch.backend to "torch"',
            )
        )


def _machine() -> str:
    # Containers may share a host name; the boot id tells machines apart.
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"
