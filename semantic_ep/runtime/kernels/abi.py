"""The kernel libraries as ctypes sees them: structs of `csrc/abi.h`, entry points. No torch."""

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    byref,
    c_char,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_uint32,
    c_uint64,
    c_void_p,
)
from enum import IntEnum
from pathlib import Path

ABI_VERSION = 2
MAX_RANKS = 64
MAX_TOPK = 16
FLAG_BYTES = 4096


class Part(IntEnum):
    """Which received rows a kernel works on."""

    ALL = 0
    OWN = 1  # of this rank's tokens: no flag is waited for, none is stored
    OTHERS = 2


class Dtype(IntEnum):
    """Element types of combined rows."""

    F32 = 0
    F16 = 1
    BF16 = 2
    F64 = 3


class KernelError(IntEnum):
    """What a kernel reports in its status."""

    OK = 0
    TIMEOUT = 1
    PEER_FAILED = 2
    CAPACITY = 3
    ROWS = 4
    BAD_SLOT = 5
    SHUFFLE_MISMATCH = 6


CHANNELS = ("dispatch", "combine", "shuffled reduce-scatter", "shuffled all-gather")


class State(ctypes.Structure):
    """A rank's device memory: epochs, block counters, failed."""

    _fields_ = [
        ("epoch", c_uint32 * 4),
        ("finished", c_int32 * 2 * 4),
        ("failed", c_int32),
    ]


class Status(ctypes.Structure):
    """What the host sees of a failure."""

    _fields_ = [("error", c_int32), ("channel", c_int32), ("peer", c_int32), ("detail", c_int32)]


class Group(ctypes.Structure):
    """Who this rank is and where the symmetric heaps are."""

    _fields_ = [
        ("rank", c_int32),
        ("num_ranks", c_int32),
        ("timeout_ns", c_int64),
        ("heap", c_void_p * MAX_RANKS),
        ("state", c_void_p),
        ("status", c_void_p),
    ]


class Launch(ctypes.Structure):
    """Grid size and stream of one kernel."""

    _fields_ = [("blocks", c_int32), ("threads", c_int32), ("stream", c_void_p)]


_MOE_SIZES = (
    "tokens topk slots_per_rank capacity row_bytes scale_bytes row_stride scale_stride"
    " partial_stride hidden max_rows dtype weight_words part"
)
_MOE_OFFSETS = "slot_count_offset record_offset row_offset scale_offset partial_offset grad_offset"
_MOE_POINTERS = (
    "slot weight x scales rank_position entry_position rank_count slot_count recv_count"
    " tokens_per_slot slot_base total_rows expanded_row source_token rows row_scales row_weight"
    " y row_grad out route_grad y_grad row_weight_grad"
)


class Moe(ctypes.Structure):
    """Arguments of dispatch and combine; shapes in `csrc/abi.h`."""

    _fields_ = [
        ("group", Group),
        *((name, c_int32) for name in _MOE_SIZES.split()),
        *((name, c_int64) for name in _MOE_OFFSETS.split()),
        *((name, c_void_p) for name in _MOE_POINTERS.split()),
    ]


_SHUFFLE_SIZES = ("rows_per_rank", "num_rows", "hidden", "row_bytes", "row_stride", "dtype")


class Shuffle(ctypes.Structure):
    """Arguments of shuffled reduce-scatter and all-gather; shapes in `csrc/abi.h`."""

    _fields_ = [
        ("group", Group),
        *((name, c_int32) for name in _SHUFFLE_SIZES),
        *((name, c_int64) for name in ("scatter_offset", "gather_offset", "fingerprint_offset")),
        *((name, c_void_p) for name in ("permutation", "x", "out")),
    ]


class LibraryMismatchError(RuntimeError):
    """A library that was built from other sources."""


_MOE_KERNELS = ("layout", "receive", "expand", "reduce", "pull", "expand_grad")
_SHUFFLE_KERNELS = (
    "shuffle_fingerprint",
    "scatter_send",
    "scatter_sum",
    "gather_send",
    "gather_copy",
)


class KernelLibrary:
    """One loaded library. Methods queue kernels on a stream and raise if that fails."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._dll = ctypes.CDLL(str(path))
        self._check_abi()
        for name in _MOE_KERNELS:
            getattr(self._dll, f"sep_{name}").argtypes = [POINTER(Moe), Launch]
        for name in _SHUFFLE_KERNELS:
            getattr(self._dll, f"sep_{name}").argtypes = [POINTER(Shuffle), Launch]
        self._dll.sep_send.argtypes = [POINTER(Moe), Launch, c_int]
        self.is_emulator = hasattr(self._dll, "sep_emu_synchronize")

    def _check_abi(self) -> None:
        found = self._dll.sep_abi_version()
        sizes = [self._dll.sep_struct_bytes(i) for i in range(5)]
        expected = [ctypes.sizeof(s) for s in (Moe, Shuffle, State, Status, Launch)]
        if found != ABI_VERSION or sizes != expected:
            raise LibraryMismatchError(
                f"{self.path} has ABI version {found} and struct sizes {sizes}; this package needs"
                f" version {ABI_VERSION} and {expected}. Delete the file: it is built again at the"
                " next use."
            )

    def launch_moe(self, kernel: str, arguments: Moe, launch: Launch) -> None:
        """Queues `layout`, `receive`, `expand`, `reduce`, `pull` or `expand_grad`."""
        self._raise_for(getattr(self._dll, f"sep_{kernel}")(byref(arguments), launch), kernel)

    def launch_send(self, arguments: Moe, launch: Launch, *, with_routes: bool) -> None:
        """Queues `send`; without routes only rows travel, along routes sent before."""
        self._raise_for(self._dll.sep_send(byref(arguments), launch, int(with_routes)), "send")

    def launch_shuffle(self, kernel: str, arguments: Shuffle, launch: Launch) -> None:
        """Queues one of the shuffle kernels."""
        self._raise_for(getattr(self._dll, f"sep_{kernel}")(byref(arguments), launch), kernel)

    def _raise_for(self, code: int, kernel: str) -> None:
        if code == 0:
            return
        text = "unknown dtype" if code == -1 else f"CUDA error {code}"
        if code != -1 and not self.is_emulator:
            self._dll.sep_cuda_error.restype = c_char_p
            text = self._dll.sep_cuda_error(code).decode()
        raise RuntimeError(f"launch of the {kernel} kernel failed: {text}")


class EmulatorLibrary(KernelLibrary):
    """The library over the emulator. Kernels of all the process's ranks run in `synchronize`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if not self.is_emulator:
            raise LibraryMismatchError(f"{path} is not an emulator library")
        self._dll.sep_emu_new_stream.restype = c_void_p
        self._dll.sep_emu_error.restype = c_char_p
        self._dll.sep_emu_configure.argtypes = [c_uint64, c_int, c_int, c_int]

    def new_stream(self, device: int) -> int:
        """A stream of an emulated device; residency limits count a device's blocks."""
        stream: int = self._dll.sep_emu_new_stream(device)
        return stream

    def configure(
        self,
        *,
        seed: int,
        max_resident_blocks: int = 0,
        yield_percent: int = 25,
        foreign_ranks: bool = False,
    ) -> None:
        """Sets the schedule.

        Args:
            seed: The schedule is a function of it.
            max_resident_blocks: Of one device; 0 for no limit.
            yield_percent: How often a thread hands over at an atomic or a flag.
            foreign_ranks: Other ranks are other processes, so an idle spin is no deadlock.
        """
        self._dll.sep_emu_configure(seed, max_resident_blocks, yield_percent, int(foreign_ranks))

    def synchronize(self) -> None:
        """Runs everything queued.

        Raises:
            RuntimeError: deadlock, divergent barrier or warp collective, with kernel and line.
        """
        if self._dll.sep_emu_synchronize():
            raise RuntimeError(f"emulator: {self._dll.sep_emu_error().decode()}")


class CudaLibrary(KernelLibrary):
    """The library built by nvcc."""

    def allocate(self, num_bytes: int) -> int:
        """Device memory on the current device, zeroed, that `export` can share."""
        pointer = c_void_p()
        self._raise_for(self._dll.sep_cuda_allocate(byref(pointer), c_int64(num_bytes)), "allocate")
        assert pointer.value is not None
        return pointer.value

    def free(self, pointer: int) -> None:
        """Gives back what `allocate` returned."""
        self._raise_for(self._dll.sep_cuda_free(c_void_p(pointer)), "free")

    def export(self, pointer: int) -> bytes:
        """A handle by which another process of the node maps this memory."""
        handle = (c_char * 64)()
        self._raise_for(self._dll.sep_cuda_export(c_void_p(pointer), handle), "export")
        return bytes(handle)

    def map(self, handle: bytes) -> int:
        """Maps a peer's exported memory."""
        pointer = c_void_p()
        self._raise_for(self._dll.sep_cuda_import(c_char_p(handle), byref(pointer)), "map")
        assert pointer.value is not None
        return pointer.value

    def unmap(self, pointer: int) -> None:
        """Ends a mapping made by `map`."""
        self._raise_for(self._dll.sep_cuda_close(c_void_p(pointer)), "unmap")
