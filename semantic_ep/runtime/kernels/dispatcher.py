"""The `kernels` dispatcher: our dispatch and combine behind the one protocol.

Shapes: T tokens on this rank, D hidden, K top-k, R received rows, S slots a rank, G EP ranks.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from semantic_ep.errors import BackendError, explain
from semantic_ep.runtime.collectives import peer_guard
from semantic_ep.runtime.dispatch import Dispatched, check_inputs
from semantic_ep.runtime.kernels.endpoint import MoeHeap
from semantic_ep.runtime.kernels.exchange import KernelExchange, accumulator, load_library
from semantic_ep.runtime.kernels.ops import Routes
from semantic_ep.runtime.symm import allocate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from semantic_ep.runtime.stats import DispatchStats

_FLAG_BYTES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shape:
    """What one symmetric heap is made for."""

    dtype: torch.dtype
    hidden: int
    topk: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _State:
    """What combine needs of its dispatch."""

    exchange: KernelExchange
    routes: Routes
    rows_received: list[int] | None


class KernelDispatcher:
    """See `semantic_ep.runtime.dispatch.Dispatcher`; all ranks of the group on one machine.

    Args:
        group: Process group of the EP ranks; used to set up, not on the hot path.
        slots_per_rank: S.
        stats: Counters to keep.
        max_tokens: Most tokens a rank may dispatch. None: the ranks agree on it at each call, which
            costs a collective; give it on GPUs.
        max_rows: Fixed number of rows (R) to return, those beyond `tokens_per_slot_S.sum()`
            undefined. Then nothing waits for the device, so that a CUDA graph can be captured, and
            no counters are kept. None: exactly the received rows.
        timeout_s: Seconds to wait for a peer.
    """

    def __init__(
        self,
        *,
        group: ProcessGroup,
        slots_per_rank: int,
        stats: DispatchStats,
        max_tokens: int | None = None,
        max_rows: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self.group = group
        self.slots_per_rank = slots_per_rank
        self.stats = stats
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self._timeout_s = timeout_s
        self._exchanges: dict[_Shape, KernelExchange] = {}

    def dispatch(
        self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, *, layer: int = 0
    ) -> Dispatched:
        """See `Dispatcher.dispatch`."""
        check_inputs(x_TD, slot_TK, weight_TK, self.group.size() * self.slots_per_rank)
        exchange = self._exchange(x_TD, slot_TK.shape[1])
        slot_TK = slot_TK.to(torch.int32)
        rows, _, row_weight, tokens_per_slot, slot_count, *routes = torch.ops.semantic_ep.dispatch(
            x_TD,
            None,
            slot_TK,
            weight_TK.to(accumulator(x_TD.dtype)),
            exchange.key,
            -1 if self.max_rows is None else self.max_rows,
        )
        state = _State(exchange=exchange, routes=Routes(slot_TK, *routes), rows_received=None)
        tokens_per_slot_S = tokens_per_slot.long()
        if self.max_rows is None:
            received = self._record(layer, x_TD, state.routes, slot_count, tokens_per_slot_S)
            state = dataclasses.replace(state, rows_received=received)
        return Dispatched(
            rows_RD=rows,
            weight_R=row_weight,
            tokens_per_slot_S=tokens_per_slot_S,
            num_tokens=len(x_TD),
            layer=layer,
            state=state,
        )

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """See `Dispatcher.combine`."""
        state: _State = dispatched.state
        exchange = state.exchange
        row_bytes = y_RD.shape[1] * y_RD.element_size()
        if row_bytes > exchange.heap.partial_bytes or accumulator(y_RD.dtype) != (
            dispatched.weight_R.dtype
        ):
            raise BackendError(
                explain(
                    "combined rows must be as wide as dispatched rows",
                    got=f"{tuple(y_RD.shape)} {y_RD.dtype}",
                    allowed=f"at most {exchange.heap.partial_bytes} bytes a row",
                )
            )
        out_TD = torch.ops.semantic_ep.combine(
            y_RD, dispatched.weight_R, *state.routes, exchange.key
        )
        if state.rows_received is not None:
            self.stats.record_combine(
                dispatched.layer, rows=state.rows_received, row_bytes=row_bytes
            )
        return out_TD

    def close(self) -> None:
        """Give the symmetric memory back; collective."""
        for exchange in self._exchanges.values():
            exchange.close()
        self._exchanges.clear()

    def _exchange(self, x_TD: Tensor, topk: int) -> KernelExchange:
        """The exchange for rows of this kind, with room for every rank's tokens."""
        tokens = self._agreed_tokens(x_TD)
        shape = _Shape(dtype=x_TD.dtype, hidden=x_TD.shape[1], topk=topk)
        known = self._exchanges.get(shape)
        if known is not None and tokens <= known.heap.capacity:
            return known
        row_bytes = x_TD.shape[1] * x_TD.element_size()
        heap = MoeHeap(
            num_ranks=self.group.size(),
            slots_per_rank=self.slots_per_rank,
            capacity=self.max_tokens or 1 << max(0, tokens - 1).bit_length(),
            topk=topk,
            row_bytes=row_bytes,
            partial_bytes=row_bytes,
        )
        library = load_library(x_TD.device.type)
        memory = allocate(self.group, heap.offsets()["end"], x_TD.device, library)
        # The one it replaces is not closed here: gradients may still have to travel through it.
        exchange = KernelExchange(memory, heap, x_TD.device, timeout_s=self._timeout_s)
        self._exchanges[shape] = exchange
        return exchange

    def _agreed_tokens(self, x_TD: Tensor) -> int:
        if self.max_tokens is not None:
            if len(x_TD) > self.max_tokens:
                raise BackendError(
                    explain(
                        "more tokens than the kernels' buffers were made for",
                        got=len(x_TD),
                        allowed=f"max_tokens = {self.max_tokens}",
                        do="Make the dispatcher with a larger max_tokens on all ranks",
                    )
                )
            return self.max_tokens
        most = torch.tensor(len(x_TD), device=x_TD.device)
        with peer_guard("agreement on the number of tokens", self.group):
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        return int(most)

    def _record(
        self,
        layer: int,
        x_TD: Tensor,
        routes: Routes,
        slot_count: Tensor,
        tokens_per_slot_S: Tensor,
    ) -> list[int]:
        """Counts one dispatch; returns the rows received from each rank."""
        ranks, topk = self.group.size(), routes.slot_TK.shape[1]
        activations_G = slot_count.view(ranks, self.slots_per_rank).sum(dim=1)
        tokens = (routes.slot_TK >= 0).any(dim=1).sum(dim=0, keepdim=True)
        numbers = torch.cat([routes.rank_count_G, routes.recv_count_G, activations_G, tokens])
        counts = numbers.tolist()
        rows, received = counts[:ranks], counts[ranks : 2 * ranks]
        weight_bytes = accumulator(x_TD.dtype).itemsize
        record_bytes = 4 + topk * (8 + weight_bytes)
        per_rank_bytes = _FLAG_BYTES + 4 * self.slots_per_rank
        self.stats.record_dispatch(
            layer,
            tokens=counts[-1],
            activations=counts[2 * ranks : 3 * ranks],
            rows=rows,
            row_bytes=x_TD.shape[1] * x_TD.element_size(),
            metadata_bytes=[per_rank_bytes + sent * record_bytes for sent in rows],
            tokens_per_slot=tokens_per_slot_S,
        )
        return received
