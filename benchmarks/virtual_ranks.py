"""Several EP ranks in one process: on one GPU, a stream each; on the CPU, in the emulator.

The kernels are those of real ranks; only the symmetric heaps lie in one memory. On a GPU every
block that may wait must be resident, so ranks * blocks stays within the number of multiprocessors.
Nor may the driver wait for kernels that wait for ranks not queued yet: no stream shares a hardware
queue, kernels are loaded and memory is reserved before.

Shapes: T tokens of a rank, D hidden, K top-k, S slots a rank, G ranks, R rows of a rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from semantic_ep.runtime.kernels import ops
from semantic_ep.runtime.kernels.endpoint import EMULATED_GRID, GPU_GRID, Grid, MoeHeap
from semantic_ep.runtime.kernels.exchange import KernelExchange
from semantic_ep.runtime.symm import LocalMemory

# Read when CUDA starts, which importing torch does not do.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
# Passes whose results a caller may hold at once without a wait in between.
_PASSES_HELD = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """What dispatch gave one rank; rows beyond `tokens_per_slot_S.sum()` are undefined."""

    rows_RD: Tensor
    weight_R: Tensor
    tokens_per_slot_S: Tensor
    routes: ops.Routes


class VirtualRanks:
    """Dispatch and combine of all ranks, queued rank by rank.

    Args:
        num_ranks: G.
        slots_per_rank: S.
        max_tokens: Most tokens of a rank.
        topk: K.
        hidden: D.
        dtype: Of rows.
        device: A GPU or the CPU.
        max_rows: Rows that a rank can receive; every route of every rank by default.
    """

    def __init__(
        self,
        *,
        num_ranks: int,
        slots_per_rank: int,
        max_tokens: int,
        topk: int,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device,
        max_rows: int | None = None,
    ) -> None:
        self.device = device
        self.max_rows = num_ranks * max_tokens * topk if max_rows is None else max_rows
        heap = MoeHeap(
            num_ranks=num_ranks,
            slots_per_rank=slots_per_rank,
            capacity=max_tokens,
            topk=topk,
            row_bytes=hidden * dtype.itemsize,
            partial_bytes=hidden * dtype.itemsize,
        )
        memories = LocalMemory.create(num_ranks, heap.offsets()["end"], device)
        grid = grid_for(num_ranks, device)
        self.exchanges = [
            KernelExchange(memory, heap, device, grid=grid, timeout_s=20, deferred=True)
            for memory in memories
        ]
        self.streams = (
            [torch.cuda.Stream(device) for _ in memories] if device.type == "cuda" else None
        )
        self._reserved: set[tuple[torch.Size, ...]] = set()

    def dispatch(self, x: list[Tensor], slot: list[Tensor], weight: list[Tensor]) -> list[Rows]:
        """Queue the dispatch of all ranks: int32 slots, accumulator weights."""
        self._reserve(x, slot, weight)
        self.fork()
        received = []
        for rank, exchange in enumerate(self.exchanges):
            with self.stream(rank):
                rows, _, row_weight, per_slot, _, *routes = torch.ops.semantic_ep.dispatch(
                    x[rank], None, slot[rank], weight[rank], exchange.key, self.max_rows
                )
            received.append(
                Rows(
                    rows_RD=rows,
                    weight_R=row_weight,
                    tokens_per_slot_S=per_slot,
                    routes=ops.Routes(slot[rank], *routes),
                )
            )
        return received

    def combine(self, y: list[Tensor], received: list[Rows]) -> list[Tensor]:
        """Queue the combine of all ranks."""
        self.fork()
        out = []
        for rank, exchange in enumerate(self.exchanges):
            with self.stream(rank):
                here = received[rank]
                out.append(
                    torch.ops.semantic_ep.combine(
                        y[rank], here.weight_R, *here.routes, exchange.key
                    )
                )
        return out

    def finish(self) -> None:
        """Wait for everything queued and raise the failures of any rank."""
        if self.streams is not None:
            torch.cuda.synchronize(self.device)
        for exchange in self.exchanges:
            exchange.run_queued()

    def join(self) -> None:
        """Make the current stream wait for all ranks' streams (GPU)."""
        for stream in self.streams or ():
            torch.cuda.current_stream(self.device).wait_stream(stream)

    def fork(self) -> None:
        """Make all ranks' streams wait for the current stream (GPU)."""
        for stream in self.streams or ():
            stream.wait_stream(torch.cuda.current_stream(self.device))

    def _reserve(self, x: list[Tensor], slot: list[Tensor], weight: list[Tensor]) -> None:
        """Let torch's allocator keep what passes of these shapes need, on each rank's stream."""
        shapes = tuple(rows.shape for rows in x)
        if self.streams is None or shapes in self._reserved:
            return
        self._reserved.add(shapes)
        for rank, exchange in enumerate(self.exchanges):
            inputs = (x[rank], None, slot[rank], weight[rank])
            with self.stream(rank):
                held: list[tuple[Tensor, ...]] = []
                for _ in range(_PASSES_HELD):
                    held.append(ops.dispatch_outputs(*inputs, exchange.key, self.max_rows))
                    held.append((torch.empty_like(x[rank]), torch.empty_like(slot[rank])))
                held.clear()
        torch.cuda.synchronize(self.device)

    @contextlib.contextmanager
    def stream(self, rank: int) -> Iterator[None]:
        """Make a rank's stream the current one (GPU)."""
        if self.streams is None:
            yield
        else:
            with torch.cuda.stream(self.streams[rank]):
                yield


def grid_for(num_ranks: int, device: torch.device) -> Grid:
    """Launch sizes with which all ranks' blocks are resident at once."""
    if device.type != "cuda":
        return EMULATED_GRID
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    resident = max(1, processors // num_ranks)
    return dataclasses.replace(GPU_GRID, blocks=resident, local_blocks=resident)


def random_inputs(
    num_ranks: int,
    *,
    tokens: int,
    hidden: int,
    slots_per_rank: int,
    topk: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    dropped: float = 0.0,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """x, int32 slots (uniform, distinct) and weights of every rank."""
    draw = torch.Generator().manual_seed(seed)
    x, slot, weight = [], [], []
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    for _ in range(num_ranks):
        x.append(torch.randn(tokens, hidden, generator=draw).to(device, dtype))
        scores = torch.rand(tokens, num_ranks * slots_per_rank, generator=draw)
        chosen = scores.topk(topk).indices.int()
        chosen[torch.rand(tokens, topk, generator=draw) < dropped] = -1
        slot.append(chosen.to(device))
        weight.append(torch.rand(tokens, topk, generator=draw).to(device, accumulator))
    return x, slot, weight


def check(
    x: list[Tensor], slot: list[Tensor], weight: list[Tensor], received: list[Rows], slots: int
) -> None:
    """Compare received rows with the contract: sorted by slot, then source rank, then token."""
    for rank, here in enumerate(received):
        order = []
        for source, routes in enumerate(slot):
            token, choice = (routes // slots == rank).logical_and(routes >= 0).nonzero().unbind(1)
            source_key = torch.full_like(token, source)
            order.append(torch.stack([routes[token, choice].long(), source_key, token, choice], 1))
        expected = torch.cat(order)
        expected = expected[torch.argsort(expected[:, 0], stable=True)]
        assert int(here.tokens_per_slot_S.sum()) == len(expected)
        all_x = torch.cat(x)
        flat = expected[:, 1] * len(x[0]) + expected[:, 2]
        assert torch.equal(here.rows_RD[: len(expected)], all_x[flat])
        all_weight = torch.cat(weight)
        assert torch.equal(here.weight_R[: len(expected)], all_weight[flat, expected[:, 3]])
