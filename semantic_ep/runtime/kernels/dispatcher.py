"""The `kernels` dispatcher: our dispatch and combine behind the one protocol.

Shapes: T tokens on this rank, D hidden, K top-k, R received rows, S slots a rank, G EP ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from semantic_ep.errors import BackendError, explain
from semantic_ep.runtime.collectives import peer_guard
from semantic_ep.runtime.dispatch import Dispatched, check_inputs
from semantic_ep.runtime.kernels import local_first
from semantic_ep.runtime.kernels.endpoint import MoeHeap
from semantic_ep.runtime.kernels.exchange import KernelExchange, accumulator, load_library
from semantic_ep.runtime.kernels.ops import Routes
from semantic_ep.runtime.overlap import OverlapMode, splits
from semantic_ep.runtime.symm import allocate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from semantic_ep.runtime.stats import DispatchStats

logger = logging.getLogger(__name__)

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
    """See `semantic_ep.runtime.dispatch.LocalFirstDispatcher`; all ranks on one machine.

    Args:
        group: Process group of the EP ranks; used to set up, not on the hot path.
        slots_per_rank: S.
        stats: Counters to keep.
        max_tokens: Most tokens a rank may dispatch. None: the ranks agree on it at each call, which
            costs a collective; give it on GPUs.
        max_rows: Fixed number of rows (R) to return, those beyond `tokens_per_slot_S.sum()`
            undefined. Then nothing waits for the device, so that a CUDA graph can be captured, no
            counters are kept and all rows are handed over at once. None: exactly the received rows.
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
            received = self._record(
                layer, x_TD, state.routes, slot_count, tokens_per_slot_S, received=True
            )
            state = dataclasses.replace(state, rows_received=received)
        return Dispatched(
            rows_RD=rows,
            weight_R=row_weight,
            tokens_per_slot_S=tokens_per_slot_S,
            num_tokens=len(x_TD),
            layer=layer,
            state=state,
        )

    def dispatch_local_first(
        self,
        x_TD: Tensor,
        slot_TK: Tensor,
        weight_TK: Tensor,
        *,
        overlap: OverlapMode,
        layer: int = 0,
    ) -> Dispatched:
        """See `LocalFirstDispatcher.dispatch_local_first`.

        Raises:
            BackendError: Overlap is "on" and the number of rows is fixed.
        """
        check_inputs(x_TD, slot_TK, weight_TK, self.group.size() * self.slots_per_rank)
        if not self._splits(overlap, x_TD, slot_TK):
            return self.dispatch(x_TD, slot_TK, weight_TK, layer=layer)
        exchange = self._exchange(x_TD, slot_TK.shape[1])
        parts = local_first.OwnRowsFirst(
            exchange,
            x_TD,
            slot_TK.to(torch.int32),
            weight_TK.to(accumulator(x_TD.dtype)),
            on_arrival=functools.partial(self.stats.record_slots, layer),
        )
        own, routes = parts.own, parts.routes
        self._record(layer, x_TD, routes, parts.slot_count, own.tokens_per_slot_S, received=False)
        return Dispatched(
            rows_RD=own.rows_RD,
            weight_R=own.weight_R,
            tokens_per_slot_S=own.tokens_per_slot_S,
            num_tokens=len(x_TD),
            layer=layer,
            state=_State(exchange=exchange, routes=routes, rows_received=None),
            travelling=parts,
        )

    def combine(
        self, y_RD: Tensor, dispatched: Dispatched, y_travelled_RD: Tensor | None = None
    ) -> Tensor:
        """See `LocalFirstDispatcher.combine`."""
        state: _State = dispatched.state
        self._check_results(y_RD, dispatched)
        row_bytes = y_RD.shape[1] * y_RD.element_size()
        parts = dispatched.travelling
        if isinstance(parts, local_first.OwnRowsFirst):
            assert y_travelled_RD is not None, "results of the rows that travelled are missing"
            self._check_results(y_travelled_RD, dispatched)
            out_TD = local_first.combine(y_RD, y_travelled_RD, parts)
            received = parts.received
        else:
            out_TD = torch.ops.semantic_ep.combine(
                y_RD, dispatched.weight_R, *state.routes, state.exchange.key
            )
            received = state.rows_received
        if received is not None:
            self.stats.record_combine(dispatched.layer, rows=received, row_bytes=row_bytes)
        return out_TD

    def close(self) -> None:
        """Give the symmetric memory back; collective."""
        for exchange in self._exchanges.values():
            exchange.close()
        self._exchanges.clear()

    def _check_results(self, y_RD: Tensor, dispatched: Dispatched) -> None:
        """Raise `BackendError` unless these rows fit the heap and are summed as weights are."""
        exchange = dispatched.state.exchange
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

    def _splits(self, overlap: OverlapMode, x_TD: Tensor, slot_TK: Tensor) -> bool:
        """Whether own rows come first in this call."""
        if overlap == "off":
            return False
        if self.max_rows is not None:
            reason = "a fixed number of rows is handed over at once, without a look at the device"
            if overlap == "on":
                raise BackendError(
                    explain(
                        f"cannot hand over own rows first: {reason}",
                        where="semantic_ep.dispatch.overlap, --semantic-ep-dispatch-overlap",
                        got=f"on, max_rows = {self.max_rows}",
                        allowed=["auto", "off"],
                        do="Or make the dispatcher without max_rows",
                    )
                )
            _log_no_overlap(reason)
            return False
        decide = functools.partial(
            splits, overlap, num_slots=self.slots_per_rank, device=x_TD.device, dtype=x_TD.dtype
        )
        tokens, topk = slot_TK.shape
        most = tokens * min(topk, self.slots_per_rank)
        if overlap == "on" or not decide(own_rows=most, other_rows=most):
            return overlap == "on"
        slot = slot_TK[slot_TK >= 0]
        own = (
            torch.div(slot, self.slots_per_rank, rounding_mode="floor") == self.group.rank()
        ).sum()
        own_rows = int(own)
        # How many others send is known once it is here; about as many as they get.
        return decide(own_rows=own_rows, other_rows=len(slot) - own_rows)

    def _exchange(self, x_TD: Tensor, topk: int) -> KernelExchange:
        """The exchange for rows of this kind, with room for every rank's tokens."""
        for used in self._exchanges.values():
            used.settle()
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
        *,
        received: bool,
    ) -> list[int]:
        """Counts one dispatch; returns the rows received from each rank, if they are known yet."""
        ranks, topk = self.group.size(), routes.slot_TK.shape[1]
        activations_G = slot_count.view(ranks, self.slots_per_rank).sum(dim=1)
        tokens = (routes.slot_TK >= 0).any(dim=1).sum(dim=0, keepdim=True)
        known = [routes.recv_count_G] if received else []
        counts = torch.cat([routes.rank_count_G, activations_G, tokens, *known]).tolist()
        rows = counts[:ranks]
        weight_bytes = accumulator(x_TD.dtype).itemsize
        record_bytes = 4 + topk * (8 + weight_bytes)
        per_rank_bytes = _FLAG_BYTES + 4 * self.slots_per_rank
        self.stats.record_dispatch(
            layer,
            tokens=counts[2 * ranks],
            activations=counts[ranks : 2 * ranks],
            rows=rows,
            row_bytes=x_TD.shape[1] * x_TD.element_size(),
            metadata_bytes=[per_rank_bytes + sent * record_bytes for sent in rows],
            tokens_per_slot=tokens_per_slot_S,
        )
        return counts[2 * ranks + 1 :]


@functools.cache
def _log_no_overlap(reason: str) -> None:
    logger.info("local-first overlap is not used: %s", reason)
