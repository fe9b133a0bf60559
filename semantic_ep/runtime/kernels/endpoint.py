"""One rank's end of an exchange: heap layout, kernel sequences, failures.

No torch: memory is given as addresses.

Shapes: T tokens here, K top-k, S physical slots a rank, G ranks, C capacity (rows that a rank may
send to one other).
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable

from semantic_ep.errors import BackendError, PeerFailureError, explain
from semantic_ep.runtime.kernels import abi

_ALIGNMENT = 256
_ROW_ALIGNMENT = 16  # one vector access
_WARP = 32


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeHeap:
    """What a symmetric heap holds for dispatch and combine; equal on all ranks.

    Attributes:
        num_ranks: G.
        slots_per_rank: S.
        capacity: C, rows that one rank may send to one other: the most tokens a rank may have.
        topk: K.
        row_bytes: Largest dispatched row (hidden states or their gradient).
        scale_bytes: Scales that travel with a row, 0 for none.
        partial_bytes: Largest combined row.
    """

    num_ranks: int
    slots_per_rank: int
    capacity: int
    topk: int
    row_bytes: int
    scale_bytes: int = 0
    partial_bytes: int

    def __post_init__(self) -> None:
        """Refuse what the kernels cannot address."""
        limits = {"num_ranks": abi.MAX_RANKS, "topk": abi.MAX_TOPK}
        for name, most in limits.items():
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise BackendError(
                    explain(
                        f"the kernels cannot run {name} = {value}",
                        allowed=f"1 to {most}",
                        do='Set semantic_ep.dispatch.backend to "torch"',
                    )
                )

    @property
    def row_stride(self) -> int:
        """Bytes from row to row."""
        return _round_up(self.row_bytes, _ROW_ALIGNMENT)

    @property
    def scale_stride(self) -> int:
        """Bytes from scales to scales."""
        return _round_up(self.scale_bytes, _ROW_ALIGNMENT)

    @property
    def partial_stride(self) -> int:
        """Bytes from combined row to combined row."""
        return _round_up(self.partial_bytes, _ROW_ALIGNMENT)

    def offsets(self) -> dict[str, int]:
        """Where each part begins, by field of `abi.Moe`; `end` is the size of the heap."""
        rows = self.num_ranks * self.capacity
        record_words = 1 + 4 * self.topk  # token; slot, entry and a weight of up to 8 bytes a route
        sizes = {
            "slot_count_offset": 4 * self.num_ranks * self.slots_per_rank,
            "record_offset": 4 * rows * record_words,
            "row_offset": rows * self.row_stride,
            "scale_offset": rows * self.scale_stride,
            "partial_offset": rows * self.partial_stride,
            "grad_offset": 8 * rows * self.topk,
        }
        offsets, end = {}, abi.FLAG_BYTES
        for name, size in sizes.items():
            offsets[name] = end
            end += _round_up(size, _ALIGNMENT)
        return offsets | {"end": end}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShuffleHeap:
    """What a symmetric heap holds for shuffled reduce-scatter and all-gather.

    Attributes:
        num_ranks: G.
        max_rows_per_rank: Largest slice; the gathered matrix has at most G times as many rows.
        row_bytes: Bytes of a row.
    """

    num_ranks: int
    max_rows_per_rank: int
    row_bytes: int

    @property
    def row_stride(self) -> int:
        """Bytes from row to row."""
        return _round_up(self.row_bytes, _ROW_ALIGNMENT)

    def offsets(self) -> dict[str, int]:
        """Where each part begins, by field of `abi.Shuffle`; `end` is the size of the heap."""
        matrix = self.num_ranks * self.max_rows_per_rank * self.row_stride
        fingerprint = abi.FLAG_BYTES
        scatter = fingerprint + _ALIGNMENT
        gather = scatter + _round_up(matrix, _ALIGNMENT)
        return {
            "fingerprint_offset": fingerprint,
            "scatter_offset": scatter,
            "gather_offset": gather,
            "end": gather + _round_up(matrix, _ALIGNMENT),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """Launch sizes.

    On one GPU with several virtual ranks, all blocks that may wait at once must be resident: keep
    ranks * blocks, and ranks * local_blocks, at or below the number of multiprocessors.

    Attributes:
        blocks: Of kernels that reach into other ranks' memory.
        local_blocks: Of kernels that move rows within this rank's.
        threads: A block of either.
        count_blocks, count_threads: At most, of kernels that count.
        routes_per_warp: That a warp should have to count.
    """

    blocks: int
    local_blocks: int
    threads: int
    count_blocks: int
    count_threads: int
    routes_per_warp: int


# Fibers are expensive; two blocks of two warps are enough for every interleaving that matters.
EMULATED_GRID = Grid(
    blocks=2, local_blocks=2, threads=64, count_blocks=2, count_threads=64, routes_per_warp=16
)
# Links are slower than memory: fewer multiprocessors keep them busy, and others can compute.
GPU_GRID = Grid(
    blocks=64,
    local_blocks=132,
    threads=512,
    count_blocks=1 << 12,
    count_threads=1024,
    routes_per_warp=256,
)


class Endpoint:
    """Queues the kernels of one rank and says what failed.

    Args:
        library: The CUDA or the emulator library.
        rank: This rank.
        heaps: Address of every rank's symmetric heap, as mapped here; zeroed before first use.
        state: Address of `sizeof(abi.State)` zeroed bytes of this rank's device memory.
        status: Host address of an `abi.Status`, zeroed, that the device can write.
        stream: Gives the stream to queue on.
        grid: Launch sizes.
        timeout_s: Seconds to wait for a peer before giving up; 0 waits for ever.
    """

    def __init__(
        self,
        library: abi.KernelLibrary,
        *,
        rank: int,
        heaps: list[int],
        state: int,
        status: int,
        stream: Callable[[], int],
        grid: Grid,
        timeout_s: float,
    ) -> None:
        self.library = library
        self.rank = rank
        self.timeout_s = timeout_s
        self.grid = grid
        self._stream = stream
        self._status = abi.Status.from_address(status)
        self.group = abi.Group(
            rank=rank,
            num_ranks=len(heaps),
            timeout_ns=int(timeout_s * 1e9),
            heap=(ctypes.c_void_p * abi.MAX_RANKS)(*heaps),
            state=state,
            status=status,
        )

    def queue_routes(self, moe: abi.Moe) -> None:
        """Counts, sends rows with their routes, and receives the counts of all senders."""
        self.queue_layout(moe)
        self.queue_arrivals(moe)

    def queue_layout(self, moe: abi.Moe) -> None:
        """Counts where each token and each route goes."""
        targets = self.group.num_ranks * (1 + moe.slots_per_rank)
        counting = self._launch(
            min(self.grid.count_blocks, targets),
            self._counting_threads(-(-moe.tokens * moe.topk // self.grid.routes_per_warp)),
        )
        self.library.launch_moe("layout", moe, counting)

    def queue_arrivals(self, moe: abi.Moe) -> None:
        """Sends rows with their routes, and receives the counts of all senders."""
        self.library.launch_send(moe, self._link_launch(), with_routes=True)
        self.queue_receive(moe)

    def queue_receive(self, moe: abi.Moe) -> None:
        """Turns counts into places; waits for all senders, unless the part is this rank's own."""
        entries = self.group.num_ranks * moe.slots_per_rank
        threads = self._counting_threads(-(-entries // _WARP))
        self.library.launch_moe("receive", moe, self._launch(1, threads))

    def queue_expand(self, moe: abi.Moe) -> None:
        """Writes the rows of the part, one a route, sorted by slot."""
        self.library.launch_moe("expand", moe, self._local_launch())

    def queue_combine(self, moe: abi.Moe) -> None:
        """Sums each token's rows on this rank, then over ranks."""
        self.library.launch_moe("reduce", moe, self._local_launch())
        self.library.launch_moe("pull", moe, self._link_launch())

    def queue_combine_apart(self, own: abi.Moe, others: abi.Moe, whole: abi.Moe) -> None:
        """As `queue_combine`, of rows that came in two parts."""
        self.library.launch_moe("reduce", own, self._local_launch())
        self.library.launch_moe("reduce", others, self._local_launch())
        self.library.launch_moe("pull", whole, self._link_launch())

    def queue_combine_grad(self, moe: abi.Moe) -> None:
        """Sends the gradient of combined rows along known routes."""
        self.library.launch_send(moe, self._link_launch(), with_routes=False)
        self.library.launch_moe("expand_grad", moe, self._local_launch())

    def queue_combine_grad_apart(self, own: abi.Moe, others: abi.Moe) -> None:
        """As `queue_combine_grad`, of rows that came in two parts."""
        self.library.launch_send(others, self._link_launch(), with_routes=False)
        self.library.launch_moe("expand_grad", own, self._local_launch())
        self.library.launch_moe("expand_grad", others, self._local_launch())

    def queue_reduce_scatter(self, shuffle: abi.Shuffle) -> None:
        """Shuffled reduce-scatter."""
        self._queue_shuffle(shuffle, "scatter_send", "scatter_sum")

    def queue_all_gather(self, shuffle: abi.Shuffle) -> None:
        """Shuffled all-gather."""
        self._queue_shuffle(shuffle, "gather_send", "gather_copy")

    def raise_failure(self) -> None:
        """Raises what kernels have reported so far; does not wait for those still queued.

        Raises:
            PeerFailureError: A peer did not answer in time, or failed itself.
            BackendError: Overflow of a fixed capacity, a bad slot, or permutations that differ.
        """
        if self._status.error == abi.KernelError.OK:
            return
        error = abi.KernelError(self._status.error)
        operation, peer = abi.CHANNELS[self._status.channel], self._status.peer
        here = f"{operation} failed on rank {self.rank} of {self.group.num_ranks}"
        detail = self._status.detail
        if error is abi.KernelError.TIMEOUT:
            raise PeerFailureError(
                explain(
                    f"{here}: rank {peer} did not answer within {self.timeout_s:g} s",
                    do="Look for the first error in the other ranks' logs, then restart the group",
                )
            )
        if error is abi.KernelError.PEER_FAILED:
            raise PeerFailureError(
                explain(
                    f"{here}: rank {peer} reported a failure of its own",
                    do=f"Look at the error of rank {peer}, then restart the group",
                )
            )
        facts = {
            abi.KernelError.CAPACITY: f"{detail} rows for rank {peer} exceed the capacity",
            abi.KernelError.ROWS: f"{detail} rows arrived, more than max_rows",
            abi.KernelError.BAD_SLOT: f"{detail} is not a slot of the group or a row of the matrix",
            abi.KernelError.SHUFFLE_MISMATCH: f"rank {peer} shuffles by another permutation",
        }
        raise BackendError(
            explain(
                f"{here}: {facts[error]}", do="Nothing of this step may be used; restart the group"
            )
        )

    def _queue_shuffle(self, shuffle: abi.Shuffle, send: str, receive: str) -> None:
        one_block = self._launch(1, self.grid.count_threads)
        self.library.launch_shuffle("shuffle_fingerprint", shuffle, one_block)
        self.library.launch_shuffle(send, shuffle, self._link_launch())
        self.library.launch_shuffle(receive, shuffle, self._local_launch())

    def _link_launch(self) -> abi.Launch:
        return self._launch(self.grid.blocks, self.grid.threads)

    def _local_launch(self) -> abi.Launch:
        return self._launch(self.grid.local_blocks, self.grid.threads)

    def _counting_threads(self, warps: int) -> int:
        """Of a block for work that keeps so many warps busy."""
        return min(self.grid.count_threads, _WARP * max(1, warps))

    def _launch(self, blocks: int, threads: int) -> abi.Launch:
        return abi.Launch(blocks=blocks, threads=threads, stream=self._stream())
