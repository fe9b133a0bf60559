"""The `torch` backend: uneven all-to-all with our own per-rank de-duplication.

A token whose experts are on the same rank crosses once, together with the slots and weights it has
there; the remote rank sums the weighted results of the pair (token, rank) and returns one row.
Three collectives a layer: sizes (two integers a rank), rows with their routes, and the results.
There is no Python loop over tokens or ranks, and one wait for the device, on the sizes.

With `dispatch_local_first` rows of this rank's own tokens stay out of the message and can be
computed while it travels: on gloo's threads, or on NCCL's own CUDA stream.

Rows are moved as bytes, so that every dtype can travel and routes ride along in the same message.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from semantic_ep.runtime.collectives import peer_guard
from semantic_ep.runtime.dispatch import Dispatched, ExpertRows, check_inputs
from semantic_ep.runtime.overlap import OverlapMode, splits
from semantic_ep.runtime.pairs import Expanded, expand, hits, reduce, segment_sum, starts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from semantic_ep.runtime.stats import DispatchStats

# Rows of a message start on this boundary, so that a column of it can be viewed at any dtype.
_ALIGNMENT = 16
# Names of the exchanges in errors.
_DISPATCH, _COMBINE = "all-to-all of dispatch", "all-to-all of combine"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Pairs (token, rank) by peer: P sent in all, Q received in all."""

    sent: list[int]
    received: list[int]

    def reversed(self) -> _Sizes:
        """Sizes of the way back."""
        return _Sizes(sent=self.received, received=self.sent)

    def without(self, rank: int) -> _Sizes:
        """Sizes with nothing for this peer."""
        sent, received = (
            [0 if peer == rank else size for peer, size in enumerate(sizes)]
            for sizes in (self.sent, self.received)
        )
        return _Sizes(sent=sent, received=received)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Routing:
    """Routes of one call, and the pairs (token, rank) that they make: P, by rank, then token.

    Attributes:
        rank_P, token_P: The pairs.
        slot_TK, rank_TK: Physical slot and rank of each route, -1 where dropped.
        weight_TK: Combine weights.
        sizes: Pairs by peer, this rank included.
    """

    rank_P: Tensor
    token_P: Tensor
    slot_TK: Tensor
    rank_TK: Tensor
    weight_TK: Tensor
    sizes: _Sizes


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _State:
    """What combine needs of its dispatch.

    Attributes:
        sizes: Pairs by peer.
        pair_P: Index of each sent pair, in the order of the tokens, then ranks.
        first_T: Where each token begins in `pair_P`.
        expanded: Of all received pairs, or of this rank's own if the others travelled apart.
    """

    sizes: _Sizes
    pair_P: Tensor
    first_T: Tensor
    expanded: Expanded


class _Travelling:
    """See `semantic_ep.runtime.dispatch.Travelling`.

    Args:
        parts: Received rows, weights and slots, once `work` has finished.
        work: The exchange.
        dispatcher: That it is of.
        layer: That its rows are counted under.
    """

    def __init__(
        self,
        parts: tuple[Tensor, ...],
        work: dist.Work,
        *,
        dispatcher: TorchDispatcher,
        layer: int,
    ) -> None:
        self._parts = parts
        self._work = work
        self._dispatcher = dispatcher
        self._layer = layer
        self._expanded: Expanded | None = None

    def wait(self) -> ExpertRows:
        """See `Travelling.wait`."""
        return _rows(self.expanded())

    def expanded(self) -> Expanded:
        """The rows, and their way back to the pairs; waits for them at the first call."""
        if self._expanded is None:
            dispatcher = self._dispatcher
            with peer_guard(_DISPATCH, dispatcher.group):
                self._work.wait()
            self._expanded = expand(*self._parts, dispatcher.slots_per_rank)
            dispatcher.stats.record_slots(self._layer, self._expanded.tokens_per_slot_S)
        return self._expanded


def _rows(expanded: Expanded) -> ExpertRows:
    return ExpertRows(
        rows_RD=expanded.row_RD,
        weight_R=expanded.weight_R,
        tokens_per_slot_S=expanded.tokens_per_slot_S,
    )


class TorchDispatcher:
    """See `semantic_ep.runtime.dispatch.LocalFirstDispatcher`; works on gloo and NCCL."""

    def __init__(self, *, group: ProcessGroup, slots_per_rank: int, stats: DispatchStats) -> None:
        self.group = group
        self.slots_per_rank = slots_per_rank
        self.stats = stats

    def dispatch(
        self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, *, layer: int = 0
    ) -> Dispatched:
        """See `Dispatcher.dispatch`."""
        return self.dispatch_local_first(x_TD, slot_TK, weight_TK, overlap="off", layer=layer)

    def dispatch_local_first(
        self,
        x_TD: Tensor,
        slot_TK: Tensor,
        weight_TK: Tensor,
        *,
        overlap: OverlapMode,
        layer: int = 0,
    ) -> Dispatched:
        """See `LocalFirstDispatcher.dispatch_local_first`."""
        ranks, slots, me = self.group.size(), self.slots_per_rank, self.group.rank()
        check_inputs(x_TD, slot_TK, weight_TK, ranks * slots)
        slot_TK = slot_TK.long()
        # Floor division keeps a dropped route, -1, at rank -1.
        rank_TK = torch.div(slot_TK, slots, rounding_mode="floor")
        hit_TG = hits(rank_TK, ranks)
        sizes, activations, tokens = self._exchange_sizes(hit_TG, rank_TK)
        rank_P, token_P = hit_TG.t().nonzero(as_tuple=True)
        routing = _Routing(
            rank_P=rank_P,
            token_P=token_P,
            slot_TK=slot_TK,
            rank_TK=rank_TK,
            weight_TK=weight_TK,
            sizes=sizes,
        )
        travelling = None
        if splits(
            overlap,
            own_rows=activations[me],
            # A pair of another rank has at least one row here.
            other_rows=sum(sizes.received) - sizes.received[me],
            num_slots=slots,
            device=x_TD.device,
            dtype=x_TD.dtype,
        ):
            expanded, travelling, message = self._split_exchange(x_TD, routing, layer)
        else:
            message = self._message(x_TD, routing, rank_P, token_P)
            expanded = expand(*_exchange(self.group, _DISPATCH, sizes, *message), slots)
        token_order_P = torch.argsort(token_P, stable=True)
        tokens_per_slot_S = expanded.tokens_per_slot_S
        self._record(layer, sizes, activations, tokens, message, tokens_per_slot_S)
        return Dispatched(
            rows_RD=expanded.row_RD,
            weight_R=expanded.weight_R,
            tokens_per_slot_S=tokens_per_slot_S,
            num_tokens=len(x_TD),
            layer=layer,
            state=_State(
                sizes=sizes,
                pair_P=token_order_P,
                first_T=starts(token_P[token_order_P], len(x_TD)),
                expanded=expanded,
            ),
            travelling=travelling,
        )

    def combine(
        self, y_RD: Tensor, dispatched: Dispatched, y_travelled_RD: Tensor | None = None
    ) -> Tensor:
        """See `LocalFirstDispatcher.combine`."""
        state: _State = dispatched.state
        back = state.sizes.reversed()
        if isinstance(dispatched.travelling, _Travelling):
            assert y_travelled_RD is not None, "results of the rows that travelled are missing"
            own_PD = _reduced(y_RD, state.expanded)
            row_QD = _reduced(y_travelled_RD, dispatched.travelling.expanded())
            me = self.group.rank()
            (row_PD,) = _exchange(self.group, _COMBINE, back.without(me), row_QD)
            # Where they would have arrived: sums keep their order.
            before = sum(state.sizes.sent[:me])
            row_PD = torch.cat([row_PD[:before], own_PD, row_PD[before:]])
        else:
            (row_PD,) = _exchange(self.group, _COMBINE, back, _reduced(y_RD, state.expanded))
        self.stats.record_combine(
            dispatched.layer, rows=back.sent, row_bytes=y_RD.shape[1] * y_RD.element_size()
        )
        exact = torch.promote_types(y_RD.dtype, dispatched.weight_R.dtype)
        return segment_sum(row_PD.to(exact), state.pair_P, state.first_T).to(y_RD.dtype)

    def _message(
        self, x_TD: Tensor, routing: _Routing, rank_P: Tensor, token_P: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, weights and local slots of these pairs."""
        slot_PK = routing.slot_TK[token_P] - rank_P[:, None] * self.slots_per_rank
        slot_PK = torch.where(routing.rank_TK[token_P] == rank_P[:, None], slot_PK, -1).int()
        exact = torch.float64 if routing.weight_TK.dtype == torch.float64 else torch.float32
        weight_PK = routing.weight_TK.index_select(0, token_P).to(exact)
        return x_TD.index_select(0, token_P), weight_PK, slot_PK

    def _split_exchange(
        self, x_TD: Tensor, routing: _Routing, layer: int
    ) -> tuple[Expanded, _Travelling, tuple[Tensor, Tensor, Tensor]]:
        """Start the exchange with other ranks; own rows, the others, and what was sent."""
        me, sizes = self.group.rank(), routing.sizes
        first = sum(sizes.sent[:me])
        last = first + sizes.sent[me]
        rank_P, token_P = (
            torch.cat([pair_P[:first], pair_P[last:]])
            for pair_P in (routing.rank_P, routing.token_P)
        )
        message = self._message(x_TD, routing, rank_P, token_P)
        started: list[dist.Work] = []
        received = _exchange(self.group, _DISPATCH, sizes.without(me), *message, started=started)
        travelling = _Travelling(received, started[0], dispatcher=self, layer=layer)
        own = self._message(x_TD, routing, routing.rank_P[first:last], routing.token_P[first:last])
        return expand(*own, self.slots_per_rank), travelling, message

    def _exchange_sizes(self, hit_TG: Tensor, rank_TK: Tensor) -> tuple[_Sizes, list[int], int]:
        """Return pairs by peer, activations by destination rank, and tokens with any route."""
        ranks = self.group.size()
        rows_G = hit_TG.sum(dim=0)
        received_G = torch.empty_like(rows_G)
        with peer_guard("exchange of dispatch sizes", self.group):
            dist.all_to_all_single(received_G, rows_G, group=self.group)
        activations_G = torch.bincount(rank_TK.flatten() + 1, minlength=ranks + 1)[1:]
        tokens = hit_TG.any(dim=1).sum(dim=0, keepdim=True)
        numbers = torch.cat([rows_G, received_G, activations_G, tokens]).tolist()
        sizes = _Sizes(sent=numbers[:ranks], received=numbers[ranks : 2 * ranks])
        return sizes, numbers[2 * ranks : 3 * ranks], numbers[-1]

    def _record(
        self,
        layer: int,
        sizes: _Sizes,
        activations: list[int],
        tokens: int,
        message: tuple[Tensor, Tensor, Tensor],
        tokens_per_slot_S: Tensor,
    ) -> None:
        row_bytes = message[0].shape[1] * message[0].element_size()
        route_bytes = _row_layout(message)[1] - row_bytes
        size_bytes = 8
        self.stats.record_dispatch(
            layer,
            tokens=tokens,
            activations=activations,
            rows=sizes.sent,
            row_bytes=row_bytes,
            metadata_bytes=[size_bytes + rows * route_bytes for rows in sizes.sent],
            tokens_per_slot=tokens_per_slot_S,
        )


def _reduced(y_RD: Tensor, expanded: Expanded) -> Tensor:
    """The row that goes home for each pair."""
    return reduce(y_RD, expanded.weight_R, expanded.position_R, expanded.first_Q)


class _Exchange(torch.autograd.Function):
    """All-to-all of rows made of several tensors; the backward carries gradients home."""

    @staticmethod
    def forward(
        ctx: Any,
        group: ProcessGroup,
        operation: str,
        sizes: _Sizes,
        started: list[dist.Work] | None,
        *parts: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.operation, ctx.sizes = group, operation, sizes
        received = _send(group, operation, sizes, parts, started)
        ctx.mark_non_differentiable(*(part for part in received if not part.is_floating_point()))
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Integers have no gradient; every rank sees the same kinds, so messages agree.
        carried = [grad.contiguous() for grad in grads if grad.is_floating_point()]
        home = iter(
            _send(ctx.group, f"{ctx.operation}, backward", ctx.sizes.reversed(), tuple(carried))
        )
        back = (next(home) if grad.is_floating_point() else None for grad in grads)
        return (None, None, None, None, *back)


def _exchange(
    group: ProcessGroup,
    operation: str,
    sizes: _Sizes,
    *parts: Tensor,
    started: list[dist.Work] | None = None,
) -> tuple[Tensor, ...]:
    """Exchange [P, ...] tensors for [Q, ...] ones of the same kinds, in one message.

    Given a list, `started` gets the running exchange, and nothing is received until it is waited
    for.
    """
    received: tuple[Tensor, ...] = _Exchange.apply(group, operation, sizes, started, *parts)
    return received


def _send(
    group: ProcessGroup,
    operation: str,
    sizes: _Sizes,
    parts: tuple[Tensor, ...],
    started: list[dist.Work] | None = None,
) -> tuple[Tensor, ...]:
    offsets, width = _row_layout(parts)
    received = parts[0].new_empty(sum(sizes.received), width, dtype=torch.uint8)
    if len(parts) == 1:
        message = parts[0].contiguous().view(torch.uint8)
    else:
        message = received.new_empty(len(parts[0]), width)
        for part, offset in zip(parts, offsets):
            _column(message, offset, part).copy_(part)
    with peer_guard(operation, group):
        work = dist.all_to_all_single(
            received, message, sizes.received, sizes.sent, group=group, async_op=started is not None
        )
    if started is not None:
        started.append(work)
    if len(parts) == 1:
        return (received.view(parts[0].dtype),)
    # Columns of the message, not copies: whoever receives them gathers rows from them anyway.
    return tuple(_column(received, offset, part) for part, offset in zip(parts, offsets))


def _row_layout(parts: tuple[Tensor, ...]) -> tuple[list[int], int]:
    """Byte offset of each part in a row, and the width of the row; one part alone is not padded."""
    offsets, end = [], 0
    for part in parts:
        offsets.append(end)
        end += part.shape[1] * part.element_size()
        if len(parts) > 1:
            end = -(-end // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def _column(message: Tensor, offset: int, part: Tensor) -> Tensor:
    """View the bytes of one part at its dtype."""
    return message[:, offset : offset + part.shape[1] * part.element_size()].view(part.dtype)
