"""The `deepep` dispatcher: DeepEP's dispatch and combine on physical slots.

DeepEP holds that expert e lives on rank e // (E / G). Physical slots are numbered just so, whatever
the placement: slots go in where DeepEP says expert, and neither side learns of the other. The
interface is that of DeepEP 2 (`ElasticBuffer`, called `EPBuffer` from 2.5 on), in its deterministic
mode, which gives rows by source rank, then token: the order that `Dispatcher` promises.

This was written against DeepEP's documentation and is tested on gloo ranks with a stand-in of the
documented behaviour. It has not been run on GPUs, so `auto` never chooses it.

Shapes: T tokens on this rank, D hidden, K top-k, Q received rows, R rows of experts, S slots a
rank, G EP ranks.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from semantic_ep.errors import BackendError, explain
from semantic_ep.runtime.collectives import peer_guard
from semantic_ep.runtime.deepep import buffer_class
from semantic_ep.runtime.dispatch import Dispatched, check_inputs
from semantic_ep.runtime.pairs import expand, hits, reduce

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from semantic_ep.runtime.stats import DispatchStats


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Counts:
    """What one dispatch sends, and the most tokens that any rank brings.

    Attributes:
        tokens: Tokens with any route.
        activations: [G], routes by destination rank.
        rows: [G], rows by destination rank.
        rows_received: [G], rows by source rank.
        most_tokens: Largest T.
    """

    tokens: int
    activations: list[int]
    rows: list[int]
    rows_received: list[int]
    most_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Exchange:
    """One buffer of DeepEP, in use for one group.

    Attributes:
        buffer: DeepEP's.
        group: Of the EP ranks.
        num_slots: G * S.
    """

    buffer: Any
    group: ProcessGroup
    num_slots: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _State:
    """What combine needs of its dispatch.

    Attributes:
        exchange: The buffer.
        handle: DeepEP's, of the dispatch.
        position_R, first_Q: See `semantic_ep.runtime.pairs.Expanded`.
        rows_received: [G] by source rank.
    """

    exchange: _Exchange
    handle: Any
    position_R: Tensor
    first_Q: Tensor
    rows_received: list[int]


class DeepEPDispatcher:
    """See `semantic_ep.runtime.dispatch.Dispatcher`.

    Metadata is counted as the slots and weights that we hand over; DeepEP adds its own.

    Args:
        deep_ep: The module.
        group: Process group of the EP ranks.
        slots_per_rank: S.
        stats: Counters to keep.
        max_tokens: Most tokens a rank may dispatch; None: buffers grow with what the ranks bring.
    """

    def __init__(
        self,
        deep_ep: Any,
        *,
        group: ProcessGroup,
        slots_per_rank: int,
        stats: DispatchStats,
        max_tokens: int | None,
    ) -> None:
        self.group = group
        self.slots_per_rank = slots_per_rank
        self.stats = stats
        self.max_tokens = max_tokens
        self._deep_ep = deep_ep
        self._exchanges: dict[tuple[int, int], _Exchange] = {}

    def dispatch(
        self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, *, layer: int = 0
    ) -> Dispatched:
        """See `Dispatcher.dispatch`."""
        check_inputs(x_TD, slot_TK, weight_TK, self.group.size() * self.slots_per_rank)
        num_tokens, hidden = x_TD.shape
        counts = self._exchange_counts(slot_TK)
        exchange = self._exchange(counts.most_tokens, hidden, slot_TK.shape[1])
        if num_tokens == 0:
            # DeepEP does not say what it does without tokens: send one that no expert wants.
            x_TD, weight_TK = _one_row(x_TD, 0), _one_row(weight_TK, 0)
            slot_TK = _one_row(slot_TK, -1)
        # A copy: DeepEP keeps it, for combine and for gradients.
        slot_TK = slot_TK.to(
            self._deep_ep.topk_idx_t, copy=True, memory_format=torch.contiguous_format
        )
        row_QD, weight_QK, slot_QK, handle = _Dispatch.apply(
            exchange, x_TD.contiguous(), weight_TK.float().contiguous(), slot_TK
        )
        expanded = expand(row_QD, weight_QK, slot_QK, self.slots_per_rank)
        route_bytes = slot_TK.shape[1] * (slot_QK.element_size() + weight_QK.element_size())
        self.stats.record_dispatch(
            layer,
            tokens=counts.tokens,
            activations=counts.activations,
            rows=counts.rows,
            row_bytes=hidden * x_TD.element_size(),
            metadata_bytes=[rows * route_bytes for rows in counts.rows],
            tokens_per_slot=expanded.tokens_per_slot_S,
        )
        return Dispatched(
            rows_RD=expanded.row_RD,
            weight_R=expanded.weight_R,
            tokens_per_slot_S=expanded.tokens_per_slot_S,
            num_tokens=num_tokens,
            layer=layer,
            state=_State(
                exchange=exchange,
                handle=handle,
                position_R=expanded.position_R,
                first_Q=expanded.first_Q,
                rows_received=counts.rows_received,
            ),
        )

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """See `Dispatcher.combine`."""
        state: _State = dispatched.state
        row_QD = reduce(y_RD, dispatched.weight_R, state.position_R, state.first_Q)
        out_TD = _Combine.apply(state.exchange, state.handle, row_QD)
        self.stats.record_combine(
            dispatched.layer,
            rows=state.rows_received,
            row_bytes=y_RD.shape[1] * y_RD.element_size(),
        )
        return out_TD[: dispatched.num_tokens]

    def _exchange_counts(self, slot_TK: Tensor) -> _Counts:
        """Agree on the number of tokens; one small collective, and one wait for the device."""
        ranks = self.group.size()
        rank_TK = torch.div(slot_TK.long(), self.slots_per_rank, rounding_mode="floor")
        hit_TG = hits(rank_TK, ranks)
        mine_X = torch.cat(
            [
                hit_TG.sum(dim=0),
                torch.bincount(rank_TK.flatten() + 1, minlength=ranks + 1)[1:],
                hit_TG.any(dim=1).sum(dim=0, keepdim=True),
                rank_TK.new_tensor([len(slot_TK)]),
            ]
        )
        all_X = mine_X.new_empty(ranks * len(mine_X))
        with peer_guard("exchange of dispatch counts", self.group):
            dist.all_gather_into_tensor(all_X, mine_X, group=self.group)
        counts = all_X.view(ranks, -1).tolist()
        mine = counts[self.group.rank()]
        return _Counts(
            rows=mine[:ranks],
            activations=mine[ranks : 2 * ranks],
            tokens=mine[-2],
            rows_received=[row[self.group.rank()] for row in counts],
            most_tokens=max(row[-1] for row in counts),
        )

    def _exchange(self, tokens: int, hidden: int, topk: int) -> _Exchange:
        """A buffer with room for this many tokens of every rank."""
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise BackendError(
                explain(
                    "a rank brings more tokens than DeepEP's buffers were made for",
                    got=tokens,
                    allowed=f"max_tokens = {self.max_tokens}",
                    do="Make the dispatcher with a larger max_tokens on all ranks",
                )
            )
        known = self._exchanges.get((hidden, topk))
        if known is not None and tokens <= known.buffer.num_max_tokens_per_rank:
            return known
        buffer = buffer_class(self._deep_ep)(
            self.group,
            num_max_tokens_per_rank=self.max_tokens or 1 << max(0, tokens - 1).bit_length(),
            hidden=hidden,
            num_topk=topk,
            deterministic=True,
            # Rows are rounded once on each rank, not again on their way between nodes.
            allow_multiple_reduction=False,
        )
        num_slots = self.group.size() * self.slots_per_rank
        exchange = _Exchange(buffer=buffer, group=self.group, num_slots=num_slots)
        # One that it replaces lives on in the states that still have gradients to send through it.
        self._exchanges[hidden, topk] = exchange
        return exchange


class _Dispatch(torch.autograd.Function):
    """Rows and weights to their ranks; the backward sums their gradients at home."""

    @staticmethod
    def forward(
        ctx: Any, exchange: _Exchange, x_TD: Tensor, weight_TK: Tensor, slot_TK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        with peer_guard("DeepEP's dispatch", exchange.group):
            row_QD, slot_QK, weight_QK, handle, _ = exchange.buffer.dispatch(
                x_TD, topk_idx=slot_TK, topk_weights=weight_TK, num_experts=exchange.num_slots
            )
        ctx.exchange, ctx.handle = exchange, handle
        ctx.mark_non_differentiable(slot_QK)
        return row_QD, weight_QK, slot_QK, handle

    @staticmethod
    def backward(ctx: Any, row_QD: Tensor, weight_QK: Tensor, *_: Any) -> tuple[Any, ...]:
        with peer_guard("DeepEP's dispatch, backward", ctx.exchange.group):
            x_TD, weight_TK, _ = ctx.exchange.buffer.combine(
                row_QD.contiguous(), ctx.handle, topk_weights=weight_QK.contiguous()
            )
        return None, x_TD, weight_TK, None


class _Combine(torch.autograd.Function):
    """Sum of a token's rows at its home; the backward sends the gradient along the same routes."""

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, handle: Any, row_QD: Tensor) -> Tensor:
        ctx.exchange, ctx.handle = exchange, handle
        with peer_guard("DeepEP's combine", exchange.group):
            return exchange.buffer.combine(row_QD, handle)[0]

    @staticmethod
    def backward(ctx: Any, out_TD: Tensor) -> tuple[None, None, Tensor]:
        exchange = ctx.exchange
        with peer_guard("DeepEP's combine, backward", exchange.group):
            row_QD = exchange.buffer.dispatch(
                out_TD.contiguous(), handle=ctx.handle, num_experts=exchange.num_slots
            )[0]
        return None, None, row_QD


def _one_row(empty: Tensor, value: int) -> Tensor:
    """One row of this value in place of none, with gradients that lead back to `empty`."""
    return torch.nn.functional.pad(empty, (0, 0, 0, 1), value=value)
