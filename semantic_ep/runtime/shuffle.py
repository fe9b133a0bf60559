"""Shuffled reduce-scatter and all-gather: token scheduling in attention tensor parallelism.

After attention every rank holds partial sums of all N tokens. The shuffled reduce-scatter gives
each rank the sums of the tokens that were scheduled to it, and the shuffled all-gather brings rows
back to their places. Bytes are those of the plain collectives; the shuffle itself moves nothing.
Each is the other's gradient. Sums run in rank order at float32 or better and are rounded once, so
both implementations agree bit for bit.

Shapes: N tokens, D hidden, G ranks, M = ceil(N / G) rows of a slice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from semantic_ep.errors import BackendError, explain
from semantic_ep.runtime.collectives import peer_guard
from semantic_ep.runtime.kernels.endpoint import ShuffleHeap
from semantic_ep.runtime.kernels.exchange import (
    DTYPES,
    KernelExchange,
    accumulator,
    load_library,
)
from semantic_ep.runtime.symm import allocate, require_one_machine

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def permutation_of(rank_N: Tensor, num_ranks: int) -> Tensor:
    """Turn a schedule into the permutation that both operators take.

    Args:
        rank_N: Integer rank of each token; no rank may have more than M tokens.
        num_ranks: G.

    Returns:
        int32 [G * M]: token of each slice row, slices in rank order, tokens in order within a
        slice, -1 where a slice has fewer than M tokens.

    Raises:
        BackendError: A rank has more than M tokens, or a rank number is out of range.
    """
    rank_N = rank_N.long()
    tokens = len(rank_N)
    per_slice = -(-tokens // num_ranks)
    if tokens and (int(rank_N.min()) < 0 or int(rank_N.max()) >= num_ranks):
        raise BackendError(
            explain("the schedule names a rank outside the group", allowed=f"0 to {num_ranks - 1}")
        )
    load_G = torch.bincount(rank_N, minlength=num_ranks)
    if tokens and int(load_G.max()) > per_slice:
        raise BackendError(
            explain(
                "slices must be equal, but the schedule gives one rank more",
                got=f"{load_G.tolist()} tokens by rank",
                allowed=f"at most {per_slice} of {tokens} tokens a rank",
            )
        )
    order_N = torch.argsort(rank_N, stable=True)
    first_G = torch.cumsum(load_G, dim=0) - load_G
    sorted_rank_N = rank_N[order_N]
    place_N = torch.arange(tokens, device=rank_N.device) - first_G[sorted_rank_N]
    permutation = rank_N.new_full((num_ranks * per_slice,), -1, dtype=torch.int32)
    permutation[sorted_rank_N * per_slice + place_N] = order_N.int()
    return permutation


class Shuffle(Protocol):
    """Both operators; every rank of the group calls them in the same order. Differentiable."""

    def reduce_scatter(self, x_ND: Tensor, permutation: Tensor) -> Tensor:
        """Return [M, D]: the sum over ranks of the rows of this rank's slice; padding is zero.

        Args:
            x_ND: This rank's partial sums of all tokens.
            permutation: int32 [G * M] as `permutation_of` makes it, equal on all ranks.

        Raises:
            PeerFailureError: Another rank died or did not answer in time.
            BackendError: The ranks' permutations differ (found by the kernels).
        """
        ...

    def all_gather(self, x_MD: Tensor, permutation: Tensor, num_rows: int) -> Tensor:
        """Return [N, D]: every rank's slice, each row at the place that it came from.

        Args:
            x_MD: This rank's slice.
            permutation: As given to `reduce_scatter`.
            num_rows: N.

        Raises:
            PeerFailureError: Another rank died or did not answer in time.
            BackendError: The ranks' permutations differ (found by the kernels).
        """
        ...


def create_shuffle(backend: str, group: ProcessGroup) -> Shuffle:
    """The shuffle that goes with a dispatch backend; every rank of the group calls this together.

    Args:
        backend: See `semantic_ep.runtime.backends`. The kernels' own shuffle is taken where they
            are asked for by name, collectives everywhere else.
        group: Ranks.

    Raises:
        BackendError: Kernels were asked for, and the ranks are on several machines.
    """
    if backend not in ("kernels", "kernels-emulated"):
        return TorchShuffle(group)
    require_one_machine(group)
    return KernelShuffle(group)


class TorchShuffle:
    """`Shuffle` over `all_to_all_single` and `all_gather_into_tensor`; gloo and NCCL."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def reduce_scatter(self, x_ND: Tensor, permutation: Tensor) -> Tensor:
        """See `Shuffle.reduce_scatter`."""
        return _ReduceScatter.apply(self, x_ND, permutation)

    def all_gather(self, x_MD: Tensor, permutation: Tensor, num_rows: int) -> Tensor:
        """See `Shuffle.all_gather`."""
        return _AllGather.apply(self, x_MD, permutation, num_rows)

    def raw_reduce_scatter(self, x_ND: Tensor, permutation: Tensor) -> Tensor:
        """The forward computation alone."""
        ranks, hidden = self.group.size(), x_ND.shape[1]
        # A row of zeros at the end stands for padding.
        padded = torch.cat([x_ND, x_ND.new_zeros(1, hidden)])
        sent = padded[permutation.long()]  # -1 picks the last row
        received = torch.empty_like(sent)
        with peer_guard("shuffled reduce-scatter", self.group):
            dist.all_to_all_single(
                received.view(torch.uint8), sent.view(torch.uint8), group=self.group
            )
        parts = received.view(ranks, -1, hidden)
        total = parts[0].to(accumulator(x_ND.dtype))
        for part in parts[1:]:
            total = total + part
        return total.to(x_ND.dtype)

    def raw_all_gather(self, x_MD: Tensor, permutation: Tensor, num_rows: int) -> Tensor:
        """The forward computation alone."""
        slices = x_MD.new_empty(self.group.size() * len(x_MD), x_MD.shape[1])
        with peer_guard("shuffled all-gather", self.group):
            dist.all_gather_into_tensor(slices, x_MD.contiguous(), group=self.group)
        # Padding is written to a spare row at the end.
        gathered = x_MD.new_empty(num_rows + 1, x_MD.shape[1])
        gathered[permutation.long()] = slices
        return gathered[:num_rows]


class KernelShuffle:
    """`Shuffle` by the kernels; all ranks of the group on one machine.

    Args:
        group: Ranks, for setting up.
        timeout_s: Seconds to wait for a peer.
    """

    def __init__(self, group: ProcessGroup, *, timeout_s: float | None = None) -> None:
        self.group = group
        self._timeout_s = timeout_s
        self._exchanges: dict[int, KernelExchange] = {}  # by bytes of a row

    def reduce_scatter(self, x_ND: Tensor, permutation: Tensor) -> Tensor:
        """See `Shuffle.reduce_scatter`."""
        return _ReduceScatter.apply(self, x_ND, permutation)

    def all_gather(self, x_MD: Tensor, permutation: Tensor, num_rows: int) -> Tensor:
        """See `Shuffle.all_gather`."""
        return _AllGather.apply(self, x_MD, permutation, num_rows)

    def raw_reduce_scatter(self, x_ND: Tensor, permutation: Tensor) -> Tensor:
        """The forward computation alone."""
        x_ND = x_ND.contiguous()
        rows_per_rank = len(permutation) // self.group.size()
        exchange = self._exchange(x_ND, rows_per_rank)
        out = x_ND.new_empty(rows_per_rank, x_ND.shape[1])
        arguments = _arguments(exchange, x_ND, permutation, out, num_rows=len(x_ND))
        exchange.endpoint.queue_reduce_scatter(arguments)
        exchange.after_queueing()
        return out

    def raw_all_gather(self, x_MD: Tensor, permutation: Tensor, num_rows: int) -> Tensor:
        """The forward computation alone."""
        x_MD = x_MD.contiguous()
        exchange = self._exchange(x_MD, len(x_MD))
        out = x_MD.new_empty(num_rows, x_MD.shape[1])
        arguments = _arguments(exchange, x_MD, permutation, out, num_rows=num_rows)
        exchange.endpoint.queue_all_gather(arguments)
        exchange.after_queueing()
        return out

    def close(self) -> None:
        """Give the symmetric memory back; collective."""
        for exchange in self._exchanges.values():
            exchange.close()
        self._exchanges.clear()

    def _exchange(self, x: Tensor, rows_per_rank: int) -> KernelExchange:
        """The exchange for rows of this width; slices are equal, so all ranks grow it together."""
        row_bytes = x.shape[1] * x.element_size()
        known = self._exchanges.get(row_bytes)
        if known is not None and rows_per_rank <= known.heap.max_rows_per_rank:
            return known
        heap = ShuffleHeap(
            num_ranks=self.group.size(),
            max_rows_per_rank=1 << max(0, rows_per_rank - 1).bit_length(),
            row_bytes=row_bytes,
        )
        library = load_library(x.device.type)
        memory = allocate(self.group, heap.offsets()["end"], x.device, library)
        exchange = KernelExchange(memory, heap, x.device, timeout_s=self._timeout_s)
        if known is not None:
            known.close()
        self._exchanges[row_bytes] = exchange
        return exchange


def _arguments(
    exchange: KernelExchange, x: Tensor, permutation: Tensor, out: Tensor, *, num_rows: int
) -> Any:
    return exchange.shuffle_arguments(
        rows_per_rank=len(permutation) // exchange.heap.num_ranks,
        num_rows=num_rows,
        hidden=x.shape[1],
        row_bytes=x.shape[1] * x.element_size(),
        dtype=DTYPES[x.dtype],
        permutation=permutation,
        x=x,
        out=out,
    )


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shuffle: Any, x_ND: Tensor, permutation: Tensor) -> Tensor:
        ctx.shuffle, ctx.num_rows = shuffle, len(x_ND)
        ctx.save_for_backward(permutation)
        return shuffle.raw_reduce_scatter(x_ND, permutation)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[None, Tensor, None]:
        (permutation,) = ctx.saved_tensors
        return None, ctx.shuffle.raw_all_gather(grad_MD, permutation, ctx.num_rows), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shuffle: Any, x_MD: Tensor, permutation: Tensor, num_rows: int) -> Tensor:
        ctx.shuffle = shuffle
        ctx.save_for_backward(permutation)
        return shuffle.raw_all_gather(x_MD, permutation, num_rows)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[None, Tensor, None, None]:
        (permutation,) = ctx.saved_tensors
        return None, ctx.shuffle.raw_reduce_scatter(grad_ND, permutation), None, None
