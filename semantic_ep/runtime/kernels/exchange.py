"""An endpoint on torch tensors: the symmetric memory and device state of one rank, and its library.

Shapes: T tokens here, D hidden, K top-k, S physical slots a rank, G ranks, C capacity, R rows.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from semantic_ep.errors import BackendError, explain
from semantic_ep.runtime.kernels import abi, build
from semantic_ep.runtime.kernels.endpoint import (
    EMULATED_GRID,
    GPU_GRID,
    Endpoint,
    Grid,
    MoeHeap,
    ShuffleHeap,
)
from semantic_ep.runtime.symm import SymmetricMemory

TIMEOUT_VARIABLE = "SEMANTIC_EP_KERNEL_TIMEOUT_S"
DEFAULT_TIMEOUT_S = 60.0

DTYPES = {
    torch.float32: abi.Dtype.F32,
    torch.float16: abi.Dtype.F16,
    torch.bfloat16: abi.Dtype.BF16,
    torch.float64: abi.Dtype.F64,
}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows are summed, which is also that of weights."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def load_library(device_type: str) -> abi.KernelLibrary:
    """The library for "cuda" or "cpu", built if need be.

    Raises:
        BackendError: It cannot be built here; the message says why.
    """
    flavour: build.Flavour = "cuda" if device_type == "cuda" else "emulator"
    outcome = build.find_library(flavour)
    if outcome.path is None:
        raise BackendError(
            explain(
                f"the {flavour} kernel library is missing",
                got=outcome.reason,
                do="`semantic-ep doctor` says what the build needs",
            )
        )
    if flavour == "cuda":
        return abi.CudaLibrary(outcome.path)
    library = abi.EmulatorLibrary(outcome.path)
    library.configure(seed=0, foreign_ranks=True)
    return library


class KernelExchange:
    """One rank's endpoint, with the memory that it needs.

    Args:
        memory: This rank's view of the symmetric heaps.
        heap: What the heaps hold; equal on all ranks.
        device: Where the kernels run.
        grid: Launch sizes; default for the device.
        timeout_s: Seconds to wait for a peer; default `SEMANTIC_EP_KERNEL_TIMEOUT_S`, else 60.
        deferred: Only queue. For virtual ranks of one process, which must all be queued before any
            can finish: the caller calls `run_queued` of each afterwards.
    """

    def __init__(
        self,
        memory: SymmetricMemory,
        heap: MoeHeap | ShuffleHeap,
        device: torch.device,
        *,
        grid: Grid | None = None,
        timeout_s: float | None = None,
        deferred: bool = False,
    ) -> None:
        self.memory, self.heap, self.device = memory, heap, device
        self._deferred = deferred
        self._kept: list[object] = []
        self._arriving: Callable[[], object] | None = None
        self.library = load_library(device.type)
        on_gpu = device.type == "cuda"
        if timeout_s is None:
            timeout_s = float(os.environ.get(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT_S))
        self._state = torch.zeros(ctypes.sizeof(abi.State), dtype=torch.uint8, device=device)
        # Pinned, so that the host can read it while kernels are queued.
        self._status = torch.zeros(ctypes.sizeof(abi.Status), dtype=torch.uint8, pin_memory=on_gpu)
        if isinstance(self.library, abi.EmulatorLibrary):
            stream = self.library.new_stream(memory.rank)
            stream_now = lambda: stream  # noqa: E731
        else:
            stream_now = lambda: torch.cuda.current_stream(device).cuda_stream  # noqa: E731
        self.endpoint = Endpoint(
            self.library,
            rank=memory.rank,
            heaps=memory.pointers,
            state=self._state.data_ptr(),
            status=self._status.data_ptr(),
            stream=stream_now,
            grid=grid or (GPU_GRID if on_gpu else EMULATED_GRID),
            timeout_s=timeout_s,
        )
        offsets = heap.offsets()
        del offsets["end"]
        self._offsets = offsets
        self.key = id(self)
        _EXCHANGES[self.key] = self

    @functools.cached_property
    def side_stream(self) -> torch.cuda.Stream | None:
        """Where rows travel while others are computed; None but on a GPU."""
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def moe_arguments(self, **fields: Tensor | int | None) -> abi.Moe:
        """Arguments with this group's heap; tensors become addresses."""
        heap = self.heap
        assert isinstance(heap, MoeHeap)
        return abi.Moe(
            group=self.endpoint.group,
            topk=heap.topk,
            slots_per_rank=heap.slots_per_rank,
            capacity=heap.capacity,
            row_stride=heap.row_stride,
            scale_stride=heap.scale_stride,
            partial_stride=heap.partial_stride,
            **self._offsets,
            **self.addresses(fields),
        )

    def shuffle_arguments(self, **fields: Tensor | int | None) -> abi.Shuffle:
        """Likewise for the shuffles."""
        heap = self.heap
        assert isinstance(heap, ShuffleHeap)
        return abi.Shuffle(
            group=self.endpoint.group,
            row_stride=heap.row_stride,
            **self._offsets,
            **self.addresses(fields),
        )

    def after_queueing(self) -> None:
        """What every operator ends with: `run_queued`, unless that is the caller's."""
        if not self._deferred:
            self.run_queued()

    def run_queued(self) -> None:
        """Run what is queued (emulator; a GPU does so by itself) and raise failures seen so far.

        Raises:
            PeerFailureError: A peer did not answer in time, or failed itself.
            BackendError: Overflow, bad slot, or a fault that the emulator found.
        """
        if isinstance(self.library, abi.EmulatorLibrary):
            self.library.synchronize()
            self._kept.clear()
        self.endpoint.raise_failure()

    def expect(self, wait: Callable[[], object] | None) -> None:
        """Rows are on their way, and `wait` takes them in; None: it has."""
        self._arriving = wait

    def settle(self) -> None:
        """Take in rows that nobody has waited for: the next exchange needs their buffers."""
        if self._arriving is not None:
            self._arriving()

    def require_settled(self) -> None:
        """Raise `BackendError` while rows are on their way: flags and buffers are theirs."""
        if self._arriving is not None:
            raise BackendError(
                explain(
                    "an exchange begins before the rows of an earlier dispatch were waited for",
                    do="Call `travelling.wait()` of each dispatch before any backward pass",
                )
            )

    def addresses(self, fields: Mapping[str, Tensor | int | None]) -> dict[str, int | None]:
        """Arguments of kernels; tensors live until these have run."""
        if self._deferred and isinstance(self.library, abi.EmulatorLibrary):
            self._kept.append(fields)  # a GPU's allocator knows streams; memory here does not
        return {
            name: value.data_ptr() if isinstance(value, Tensor) else value
            for name, value in fields.items()
        }

    def close(self) -> None:
        """Give the symmetric memory back; collective."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.memory.close()


# Operators take integers, not objects: they name their exchange by this key.
_EXCHANGES: weakref.WeakValueDictionary[int, KernelExchange] = weakref.WeakValueDictionary()


def exchange_of(key: int) -> KernelExchange:
    """The exchange that an operator names."""
    return _EXCHANGES[key]
