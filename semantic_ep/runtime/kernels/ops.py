"""torch operators over the kernels, with gradients: dispatch and combine are each other's backward.

`Library.impl` costs about 2 microseconds a call, `custom_op` about 50: hence defined by hand.

Shapes: T tokens here, D hidden, K top-k, S physical slots a rank, G ranks, C capacity, N = G * C,
R rows received after expansion.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from semantic_ep.runtime.kernels import abi
from semantic_ep.runtime.kernels.endpoint import MoeHeap
from semantic_ep.runtime.kernels.exchange import DTYPES, KernelExchange, accumulator, exchange_of

_LIBRARY = torch.library.Library("semantic_ep", "DEF")


class Routes(NamedTuple):
    """Where rows went: what `combine` and the gradients need of their dispatch.

    Attributes:
        slot_TK: int32 global physical slots.
        rank_position_TG: int32 place of a token among the rows sent to a rank, -1: not sent.
        expanded_row_NK: int32 row of each route of a received row, -1: not for this rank.
        source_token_N: int32 token of a received row on its source rank.
        recv_count_G: int32 rows received from each rank.
        rank_count_G: int32 rows sent to each rank.
    """

    slot_TK: Tensor
    rank_position_TG: Tensor
    expanded_row_NK: Tensor
    source_token_N: Tensor
    recv_count_G: Tensor
    rank_count_G: Tensor


_ROUTES = ", ".join(f"Tensor {name}" for name in Routes._fields)
_LIBRARY.define(
    "dispatch(Tensor x, Tensor? scales, Tensor slot, Tensor weight, int exchange, int max_rows) -> "
    "(Tensor rows, Tensor row_scales, Tensor row_weight, Tensor tokens_per_slot, "
    "Tensor slot_count, Tensor rank_position, Tensor expanded_row, Tensor source_token, "
    "Tensor recv_count, "
    "Tensor rank_count)"
)
_LIBRARY.define(f"combine(Tensor y, Tensor row_weight, {_ROUTES}, int exchange) -> Tensor")
_LIBRARY.define(
    f"dispatch_backward(Tensor rows_grad, Tensor row_weight_grad, {_ROUTES}, int exchange) -> "
    "(Tensor, Tensor)"
)
_LIBRARY.define(
    f"combine_backward(Tensor grad, Tensor y, Tensor row_weight, {_ROUTES}, int exchange) -> "
    "(Tensor, Tensor)"
)


def route_buffers(heap: MoeHeap, x: Tensor) -> dict[str, Tensor]:
    """What `layout` and `expand` write about routes, by field of `abi.Moe`; not filled."""
    tokens, ranks, received = len(x), heap.num_ranks, heap.num_ranks * heap.capacity
    integers = {"dtype": torch.int32, "device": x.device}
    return {
        "rank_position": torch.empty(tokens, ranks, **integers),
        "entry_position": torch.empty(tokens, heap.topk, **integers),
        "rank_count": torch.empty(ranks, **integers),
        "slot_count": torch.empty(ranks * heap.slots_per_rank, **integers),
        "recv_count": torch.empty(ranks, **integers),
        "expanded_row": torch.empty(received, heap.topk, **integers),
        "source_token": torch.empty(received, **integers),
    }


def count_buffers(heap: MoeHeap, x: Tensor) -> dict[str, Tensor]:
    """What `receive` writes about the rows of one part, by field of `abi.Moe`; not filled."""
    ranks, slots = heap.num_ranks, heap.slots_per_rank
    integers = {"dtype": torch.int32, "device": x.device}
    return {
        "tokens_per_slot": torch.empty(slots, **integers),
        "slot_base": torch.empty(ranks, slots, **integers),
        "total_rows": torch.empty(1, **integers),
    }


def _dispatch(
    x: Tensor, scales: Tensor | None, slot: Tensor, weight: Tensor, exchange: int, max_rows: int
) -> tuple[Tensor, ...]:
    owner = exchange_of(exchange)
    owner.require_settled()
    heap = owner.heap
    x, slot, weight = x.contiguous(), slot.contiguous(), weight.contiguous()
    scales = None if scales is None else scales.contiguous()
    outputs, counts = route_buffers(heap, x), count_buffers(heap, x)
    inputs = {"x": x, "scales": scales, "slot": slot, "weight": weight}
    sizes = {
        "tokens": len(x),
        "row_bytes": x.shape[1] * x.element_size(),
        "scale_bytes": 0 if scales is None else scales.shape[1] * scales.element_size(),
        "max_rows": max_rows,
        "weight_words": weight.element_size() // 4,
    }
    arguments = owner.moe_arguments(**sizes, **inputs, **outputs, **counts)
    owner.endpoint.queue_routes(arguments)
    if max_rows < 0:
        # The exact number of rows is needed to allocate them: the one wait for the device.
        owner.run_queued()
        max_rows = int(counts["total_rows"])
        owner.endpoint.raise_failure()
    rows = x.new_empty(max_rows, x.shape[1])
    row_scales = x.new_empty(0) if scales is None else scales.new_empty(max_rows, scales.shape[1])
    row_weight = weight.new_empty(max_rows)
    arguments.max_rows = max_rows
    targets = {"rows": rows, "row_weight": row_weight, "row_scales": row_scales}
    for name, address in owner.addresses(targets).items():
        setattr(arguments, name, address)
    owner.endpoint.queue_expand(arguments)
    owner.after_queueing()
    return (
        rows,
        row_scales,
        row_weight,
        counts["tokens_per_slot"],
        outputs["slot_count"],
        outputs["rank_position"],
        outputs["expanded_row"],
        outputs["source_token"],
        outputs["recv_count"],
        outputs["rank_count"],
    )


def routed_arguments(owner: KernelExchange, routes: Routes, value: Tensor, **fields: Any) -> Any:
    """Arguments of everything that follows known routes; `value` gives dtype and width of rows."""
    return owner.moe_arguments(
        tokens=len(routes.slot_TK),
        hidden=value.shape[1],
        row_bytes=value.shape[1] * value.element_size(),
        dtype=DTYPES[value.dtype],
        weight_words=accumulator(value.dtype).itemsize // 4,
        slot=routes.slot_TK,
        rank_position=routes.rank_position_TG,
        expanded_row=routes.expanded_row_NK,
        source_token=routes.source_token_N,
        recv_count=routes.recv_count_G,
        rank_count=routes.rank_count_G,
        **fields,
    )


def _combine(y: Tensor, row_weight: Tensor, *rest: Any) -> Tensor:
    routes, owner = Routes(*rest[:-1]), exchange_of(rest[-1])
    y = y.contiguous()
    out = y.new_empty(len(routes.slot_TK), y.shape[1])
    arguments = routed_arguments(owner, routes, y, y=y, row_weight=row_weight, out=out)
    owner.endpoint.queue_combine(arguments)
    owner.after_queueing()
    return out


def _dispatch_backward(
    rows_grad: Tensor, row_weight_grad: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return dispatch_gradient(
        rows_grad, row_weight_grad, Routes(*rest[:-1]), exchange_of(rest[-1]), abi.Part.ALL
    )


def dispatch_gradient(
    rows_grad: Tensor,
    row_weight_grad: Tensor,
    routes: Routes,
    owner: KernelExchange,
    part: abi.Part,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of weights, from those of the rows of a part."""
    rows_grad, row_weight_grad = rows_grad.contiguous(), row_weight_grad.contiguous()
    x_grad = rows_grad.new_empty(len(routes.slot_TK), rows_grad.shape[1])
    weight_grad = row_weight_grad.new_empty(routes.slot_TK.shape)
    arguments = routed_arguments(
        owner,
        routes,
        rows_grad,
        part=part,
        y=rows_grad,
        row_grad=row_weight_grad,
        out=x_grad,
        route_grad=weight_grad,
    )
    owner.endpoint.queue_combine(arguments)
    owner.after_queueing()
    return x_grad, weight_grad


def _combine_backward(
    grad: Tensor, y: Tensor, row_weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    routes, owner = Routes(*rest[:-1]), exchange_of(rest[-1])
    owner.require_settled()
    grad, y = grad.contiguous(), y.contiguous()
    y_grad, row_weight_grad = torch.empty_like(y), torch.empty_like(row_weight)
    arguments = routed_arguments(
        owner,
        routes,
        grad,
        x=grad,
        y=y,
        row_weight=row_weight,
        y_grad=y_grad,
        row_weight_grad=row_weight_grad,
    )
    owner.endpoint.queue_combine_grad(arguments)
    owner.after_queueing()
    return y_grad, row_weight_grad


def dispatch_outputs(
    x: Tensor, scales: Tensor | None, slot: Tensor, weight: Tensor, exchange: int, max_rows: int
) -> tuple[Tensor, ...]:
    """What `dispatch` returns, not computed."""
    heap = exchange_of(exchange).heap
    rows = torch.library.get_ctx().new_dynamic_size() if max_rows < 0 else max_rows
    received = heap.num_ranks * heap.capacity
    return (
        x.new_empty(rows, x.shape[1]),
        x.new_empty(0) if scales is None else scales.new_empty(rows, scales.shape[1]),
        weight.new_empty(rows),
        slot.new_empty(heap.slots_per_rank),
        slot.new_empty(heap.num_ranks * heap.slots_per_rank),
        slot.new_empty(len(x), heap.num_ranks),
        slot.new_empty(received, heap.topk),
        slot.new_empty(received),
        slot.new_empty(heap.num_ranks),
        slot.new_empty(heap.num_ranks),
    )


def _combine_meta(y: Tensor, row_weight: Tensor, *rest: Any) -> Tensor:
    return y.new_empty(len(rest[0]), y.shape[1])


def _dispatch_backward_meta(
    rows_grad: Tensor, row_weight_grad: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    slot = rest[0]
    return rows_grad.new_empty(len(slot), rows_grad.shape[1]), row_weight_grad.new_empty(slot.shape)


def _combine_backward_meta(
    grad: Tensor, y: Tensor, row_weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), torch.empty_like(row_weight)


for _name, _kernel, _meta in (
    ("dispatch", _dispatch, dispatch_outputs),
    ("combine", _combine, _combine_meta),
    ("dispatch_backward", _dispatch_backward, _dispatch_backward_meta),
    ("combine_backward", _combine_backward, _combine_backward_meta),
):
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _kernel, _key)
    torch.library.register_fake(f"semantic_ep::{_name}", _meta, lib=_LIBRARY)


def _save_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, slot, _, exchange, _ = inputs
    ctx.save_for_backward(slot, *output[5:])
    ctx.exchange = exchange


def _grad_of_dispatch(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    x_grad, weight_grad = torch.ops.semantic_ep.dispatch_backward(
        grads[0], grads[2], *ctx.saved_tensors, ctx.exchange
    )
    return x_grad, None, None, weight_grad, None, None


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, exchange = inputs
    ctx.save_for_backward(*tensors)
    ctx.exchange = exchange


def _grad_of_combine(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, row_weight, *routes = ctx.saved_tensors
    y_grad, row_weight_grad = torch.ops.semantic_ep.combine_backward(
        grad, y, row_weight, *routes, ctx.exchange
    )
    return y_grad, row_weight_grad, *([None] * len(routes)), None


torch.library.register_autograd(
    "semantic_ep::dispatch", _grad_of_dispatch, setup_context=_save_dispatch, lib=_LIBRARY
)
torch.library.register_autograd(
    "semantic_ep::combine", _grad_of_combine, setup_context=_save_combine, lib=_LIBRARY
)
