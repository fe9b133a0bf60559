"""Dispatch in two parts, this rank's own rows first; combine and gradients of both parts.

Own rows need the counts of this rank's routes only: no flag of a peer is waited for. On a GPU the
other rows travel on a second stream meanwhile. The emulator runs one thing at a time: there the
exchange happens when it is waited for. Parts meet again in `combine`, which sums in the same order
as that of rows handed over at once; so peers need not split alike.

Shapes: T tokens here, D hidden, K top-k, S physical slots a rank, G ranks, R rows of a part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from semantic_ep.runtime.dispatch import ExpertRows
from semantic_ep.runtime.kernels import abi, ops
from semantic_ep.runtime.kernels.endpoint import MoeHeap
from semantic_ep.runtime.kernels.exchange import KernelExchange

_PARTS = (abi.Part.OWN, abi.Part.OTHERS)


class OwnRowsFirst:
    """One dispatch in two parts; as `Travelling`, it stands for the rows of other ranks' tokens.

    Attributes:
        own: Rows of this rank's tokens.
        routes: Of both parts; the rows of each are numbered from 0. Complete after `wait`.
        slot_count: int32 [G * S], routes of this rank to each slot.
        received: Rows received from each rank; None before `wait`.

    Args:
        owner: The exchange.
        x: [T, D].
        slot: [T, K] int32 global physical slots.
        weight: [T, K] in the accumulator of x.
        on_arrival: Told the rows of each slot when the others are here.
    """

    def __init__(
        self,
        owner: KernelExchange,
        x: Tensor,
        slot: Tensor,
        weight: Tensor,
        *,
        on_arrival: Callable[[Tensor], None],
    ) -> None:
        self.owner, self._on_arrival = owner, on_arrival
        self._x, self._weight = x.contiguous(), weight.contiguous()
        heap = owner.heap
        assert isinstance(heap, MoeHeap)
        # Kernels that are not queued yet know addresses only.
        self._kept = buffers = ops.route_buffers(heap, x) | {"slot": slot.contiguous()}
        self._counts = {part: ops.count_buffers(heap, x) for part in _PARTS}
        self.slot_count = buffers["slot_count"]
        self.received: list[int] | None = None
        self.routes = ops.Routes(
            slot_TK=buffers["slot"],
            rank_position_TG=buffers["rank_position"],
            expanded_row_NK=buffers["expanded_row"],
            source_token_N=buffers["source_token"],
            recv_count_G=buffers["recv_count"],
            rank_count_G=buffers["rank_count"],
        )
        self._arguments = {
            part: owner.moe_arguments(
                part=part,
                tokens=len(x),
                row_bytes=x.shape[1] * x.element_size(),
                max_rows=-1,
                weight_words=weight.element_size() // 4,
                x=self._x,
                weight=self._weight,
                **buffers,
                **self._counts[part],
            )
            for part in _PARTS
        }
        self._with_grad = torch.is_grad_enabled()
        self._others: ExpertRows | None = None
        owner.endpoint.queue_layout(self._arguments[abi.Part.OTHERS])
        owner.expect(self.wait)
        if owner.side_stream is not None:
            self._start(owner.side_stream, [self._x, self._weight, *buffers.values()])
        owner.endpoint.queue_receive(self._arguments[abi.Part.OWN])
        owner.run_queued()
        self.own = self._rows(abi.Part.OWN, int(self._counts[abi.Part.OWN]["total_rows"]))

    def wait(self) -> ExpertRows:
        """See `semantic_ep.runtime.dispatch.Travelling`; waits for the counts of all peers."""
        if self._others is not None:
            return self._others
        owner, counts = self.owner, self._counts[abi.Part.OTHERS]
        owner.expect(None)
        if owner.side_stream is None:
            owner.endpoint.queue_arrivals(self._arguments[abi.Part.OTHERS])
            owner.run_queued()
        with _on(owner.side_stream):  # waits for the exchange, not for work on own rows
            rows, *self.received = torch.cat(
                [counts["total_rows"], self.routes.recv_count_G]
            ).tolist()
        # Whoever calls: gradients are wanted as they were when these rows were sent.
        with torch.set_grad_enabled(self._with_grad):
            self._others = self._rows(abi.Part.OTHERS, rows)
        self._on_arrival(self._others.tokens_per_slot_S)
        return self._others

    def _start(self, side: torch.cuda.Stream, used: list[Tensor]) -> None:
        """Send and receive on the side stream, after what is queued so far."""
        side.wait_stream(torch.cuda.current_stream(self.owner.device))
        with _on(side):
            self.owner.endpoint.queue_arrivals(self._arguments[abi.Part.OTHERS])
        for tensor in (*used, *self._counts[abi.Part.OTHERS].values()):
            tensor.record_stream(side)

    def _rows(self, part: abi.Part, rows: int) -> ExpertRows:
        self.owner.endpoint.raise_failure()
        rows_RD, weight_R = _Rows.apply(self._x, self._weight, self, part, rows)
        return ExpertRows(
            rows_RD=rows_RD,
            weight_R=weight_R,
            tokens_per_slot_S=self._counts[part]["tokens_per_slot"].long(),
        )

    def expand(self, part: abi.Part, rows: int) -> tuple[Tensor, Tensor]:
        """Rows of a part and their weights; the current stream waits for them."""
        owner = self.owner
        side = owner.side_stream if part == abi.Part.OTHERS else None
        with _on(side):
            targets = {
                "rows": self._x.new_empty(rows, self._x.shape[1]),
                "row_weight": self._weight.new_empty(rows),
            }
            arguments = self._arguments[part]
            arguments.max_rows = rows
            for name, address in owner.addresses(targets).items():
                setattr(arguments, name, address)
            owner.endpoint.queue_expand(arguments)
        if side is not None:
            current = torch.cuda.current_stream(owner.device)
            current.wait_stream(side)
            for target in targets.values():
                target.record_stream(current)
        owner.run_queued()
        return targets["rows"], targets["row_weight"]


def _on(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager[object]:
    """Queue on this stream; None: on the current one."""
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


class _Rows(torch.autograd.Function):
    """Rows of one part; the backward brings their gradients home."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, dispatch: OwnRowsFirst, part: abi.Part, rows: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*dispatch.routes)
        ctx.owner, ctx.part = dispatch.owner, part
        return dispatch.expand(part, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_grad, row_weight_grad = grads
        x_grad, weight_grad = ops.dispatch_gradient(
            rows_grad, row_weight_grad, ops.Routes(*ctx.saved_tensors), ctx.owner, ctx.part
        )
        return x_grad, weight_grad, None, None, None


def combine(y_RD: Tensor, y_travelled_RD: Tensor, dispatch: OwnRowsFirst) -> Tensor:
    """[T, D], from results of own rows and of those of others."""
    others = dispatch.wait()
    out_TD: Tensor = _Combine.apply(
        y_RD,
        dispatch.own.weight_R,
        y_travelled_RD,
        others.weight_R,
        dispatch.routes,
        dispatch.owner,
    )
    return out_TD


class _Combine(torch.autograd.Function):
    """Combine of both parts; the backward is a dispatch along known routes."""

    @staticmethod
    def forward(
        ctx: Any,
        y_own: Tensor,
        weight_own: Tensor,
        y_others: Tensor,
        weight_others: Tensor,
        routes: ops.Routes,
        owner: KernelExchange,
    ) -> Tensor:
        y_own, y_others = y_own.contiguous(), y_others.contiguous()
        ctx.save_for_backward(y_own, weight_own, y_others, weight_others, *routes)
        ctx.owner = owner
        own, others = (
            ops.routed_arguments(owner, routes, y, part=part, y=y, row_weight=weight)
            for part, y, weight in zip(_PARTS, (y_own, y_others), (weight_own, weight_others))
        )
        out = y_own.new_empty(len(routes.slot_TK), y_own.shape[1])
        whole = ops.routed_arguments(owner, routes, out, out=out)
        owner.endpoint.queue_combine_apart(own, others, whole)
        owner.run_queued()
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y_own, weight_own, y_others, weight_others, *tensors = ctx.saved_tensors
        grad, routes = grads[0].contiguous(), ops.Routes(*tensors)
        ctx.owner.require_settled()
        results, arguments = [], []
        for part, y, weight in zip(_PARTS, (y_own, y_others), (weight_own, weight_others)):
            y_grad, weight_grad = torch.empty_like(y), torch.empty_like(weight)
            results += [y_grad, weight_grad]
            arguments.append(
                ops.routed_arguments(
                    ctx.owner,
                    routes,
                    grad,
                    part=part,
                    x=grad,
                    y=y,
                    row_weight=weight,
                    y_grad=y_grad,
                    row_weight_grad=weight_grad,
                )
            )
        ctx.owner.endpoint.queue_combine_grad_apart(*arguments)
        ctx.owner.run_queued()
        return *results, None, None
