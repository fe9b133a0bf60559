"""The `torch` backend: uneven all-to-all with our own per-rank de-duplication.

A token whose experts are on the same rank crosses once, together with the slots and weights it has
there; the remote rank sums the weighted results of the pair (token, rank) and returns one row.
Three collectives a layer: sizes (two integers a rank), rows with their routes, and the results.
There is no Python loop over tokens or ranks, and one wait for the device, on the sizes.

Rows are moved as bytes, so that every dtype can travel and routes ride along in the same message.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from semantic_ep.runtime.collectives import peer_guard
from semantic_ep.runtime.dispatch import Dispatched, check_inputs
from semantic_ep.runtime.pairs import expand, hits, reduce, segment_sum, starts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from semantic_ep.runtime.stats import DispatchStats

# Rows of a message start on this boundary, so that a column of it can be viewed at any dtype.
_ALIGNMENT = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Pairs (token, rank) by peer: P sent in all, Q received in all."""

    sent: list[int]
    received: list[int]

    def reversed(self) -> _Sizes:
        """Sizes of the way back."""
        return _Sizes(sent=self.received, received=self.sent)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _State:
    """What combine needs of its dispatch.

    Attributes:
        sizes: Pairs by peer.
        position_R, first_Q: See `Expanded`.
        pair_P: Index of each sent pair, in the order of the tokens, then ranks.
        first_T: Where each token begins in `pair_P`.
    """

    sizes: _Sizes
    position_R: Tensor
    first_Q: Tensor
    pair_P: Tensor
    first_T: Tensor


class TorchDispatcher:
    """See `semantic_ep.runtime.dispatch.Dispatcher`; works on gloo and NCCL."""

    def __init__(self, *, group: ProcessGroup, slots_per_rank: int, stats: DispatchStats) -> None:
        self.group = group
        self.slots_per_rank = slots_per_rank
        self.stats = stats

    def dispatch(
        self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, *, layer: int = 0
    ) -> Dispatched:
        """See `Dispatcher.dispatch`."""
        ranks, slots = self.group.size(), self.slots_per_rank
        check_inputs(x_TD, slot_TK, weight_TK, ranks * slots)
        slot_TK = slot_TK.long()
        # Floor division keeps a dropped route, -1, at rank -1.
        rank_TK = torch.div(slot_TK, slots, rounding_mode="floor")
        hit_TG = hits(rank_TK, ranks)
        sizes, activations, tokens = self._exchange_sizes(hit_TG, rank_TK)

        rank_P, token_P = hit_TG.t().nonzero(as_tuple=True)
        slot_PK, here_PK = slot_TK[token_P], rank_TK[token_P] == rank_P[:, None]
        slot_PK = torch.where(here_PK, slot_PK - rank_P[:, None] * slots, -1).int()
        carried = torch.float64 if weight_TK.dtype == torch.float64 else torch.float32
        weight_PK = weight_TK.index_select(0, token_P).to(carried)
        row_PD = x_TD.index_select(0, token_P)
        row_QD, weight_QK, slot_QK = _exchange(
            self.group, "all-to-all of dispatch", sizes, row_PD, weight_PK, slot_PK
        )

        expanded = expand(row_QD, weight_QK, slot_QK, slots)
        token_order_P = torch.argsort(token_P, stable=True)
        self._record(
            layer,
            sizes,
            activations,
            tokens,
            (row_PD, weight_PK, slot_PK),
            expanded.tokens_per_slot_S,
        )
        return Dispatched(
            rows_RD=expanded.row_RD,
            weight_R=expanded.weight_R,
            tokens_per_slot_S=expanded.tokens_per_slot_S,
            num_tokens=len(x_TD),
            layer=layer,
            state=_State(
                sizes=sizes,
                position_R=expanded.position_R,
                first_Q=expanded.first_Q,
                pair_P=token_order_P,
                first_T=starts(token_P[token_order_P], len(x_TD)),
            ),
        )

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """See `Dispatcher.combine`."""
        state: _State = dispatched.state
        row_QD = reduce(y_RD, dispatched.weight_R, state.position_R, state.first_Q)
        back = state.sizes.reversed()
        (row_PD,) = _exchange(self.group, "all-to-all of combine", back, row_QD)
        self.stats.record_combine(
            dispatched.layer, rows=back.sent, row_bytes=y_RD.shape[1] * y_RD.element_size()
        )
        exact = torch.promote_types(y_RD.dtype, dispatched.weight_R.dtype)
        return segment_sum(row_PD.to(exact), state.pair_P, state.first_T).to(y_RD.dtype)

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


class _Exchange(torch.autograd.Function):
    """All-to-all of rows made of several tensors; the backward carries gradients home."""

    @staticmethod
    def forward(
        ctx: Any, group: ProcessGroup, operation: str, sizes: _Sizes, *parts: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.operation, ctx.sizes = group, operation, sizes
        received = _send(group, operation, sizes, parts)
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
        return (None, None, None, *back)


def _exchange(
    group: ProcessGroup, operation: str, sizes: _Sizes, *parts: Tensor
) -> tuple[Tensor, ...]:
    """Exchange [P, ...] tensors for [Q, ...] ones of the same kinds, in one message."""
    return _Exchange.apply(group, operation, sizes, *parts)


def _send(
    group: ProcessGroup, operation: str, sizes: _Sizes, parts: tuple[Tensor, ...]
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
        dist.all_to_all_single(received, message, sizes.received, sizes.sent, group=group)
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
