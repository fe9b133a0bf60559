"""The `reference` backend: every rank sees every token. Simple enough to be obviously right.

It moves all tokens to all ranks, so it is for tests and for finding faults, not for speed.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from semantic_ep.runtime.collectives import peer_guard
from semantic_ep.runtime.dispatch import Dispatched, check_inputs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from semantic_ep.runtime.stats import DispatchStats


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _State:
    """Row r is activation `choice_R[r]` of gathered token `token_R[r]`; N tokens a rank, padded."""

    token_R: Tensor
    choice_R: Tensor
    padded: int
    top_k: int


class ReferenceDispatcher:
    """See `semantic_ep.runtime.dispatch.Dispatcher`."""

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
        padded = self._largest(len(x_TD), x_TD.device)
        carried = torch.float64 if weight_TK.dtype == torch.float64 else torch.float32
        x_ND = _Gather.apply(self.group, _padded(x_TD, padded, 0))
        weight_NK = _Gather.apply(self.group, _padded(weight_TK.to(carried), padded, 0))
        slot_NK = _Gather.apply(self.group, _padded(slot_TK.long(), padded, -1))
        mine_NK = torch.where(slot_NK < 0, -1, slot_NK // slots) == self.group.rank()
        token_R, choice_R = mine_NK.nonzero(as_tuple=True)
        order_R = torch.argsort(slot_NK[token_R, choice_R], stable=True)
        token_R, choice_R = token_R[order_R], choice_R[order_R]
        local_R = slot_NK[token_R, choice_R] - self.group.rank() * slots
        tokens_per_slot_S = torch.bincount(local_R, minlength=slots)
        routed_TK = slot_TK[slot_TK >= 0].long() // slots
        self.stats.record_dispatch(
            layer,
            tokens=int((slot_TK >= 0).any(dim=1).sum()),
            activations=torch.bincount(routed_TK, minlength=ranks).tolist(),
            rows=[padded] * ranks,
            row_bytes=x_TD.shape[1] * x_TD.element_size(),
            metadata_bytes=[8 + padded * slot_TK.shape[1] * (8 + weight_NK.element_size())] * ranks,
            tokens_per_slot=tokens_per_slot_S,
        )
        return Dispatched(
            rows_RD=x_ND[token_R],
            weight_R=weight_NK[token_R, choice_R],
            tokens_per_slot_S=tokens_per_slot_S,
            num_tokens=len(x_TD),
            layer=layer,
            state=_State(token_R=token_R, choice_R=choice_R, padded=padded, top_k=slot_TK.shape[1]),
        )

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """See `Dispatcher.combine`."""
        state: _State = dispatched.state
        dtype = torch.promote_types(y_RD.dtype, dispatched.weight_R.dtype)
        weighted_RD = y_RD.to(dtype) * dispatched.weight_R.to(dtype)[:, None]
        tokens, hidden = state.padded * self.group.size(), y_RD.shape[1]
        y_NKD = weighted_RD.new_zeros(tokens, state.top_k, hidden)
        y_NKD = y_NKD.index_put((state.token_R, state.choice_R), weighted_RD)
        y_ND = y_NKD.sum(dim=1).to(y_RD.dtype).to(dtype)
        total_ND = _SumOverRanks.apply(self.group, y_ND)
        self.stats.record_combine(
            dispatched.layer,
            rows=[state.padded] * self.group.size(),
            row_bytes=hidden * y_RD.element_size(),
        )
        first = self.group.rank() * state.padded
        return total_ND[first : first + dispatched.num_tokens].to(y_RD.dtype)

    def _largest(self, tokens: int, device: torch.device) -> int:
        largest = torch.tensor(tokens, device=device)
        with peer_guard("all-reduce of token counts", self.group):
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return int(largest)


class _Gather(torch.autograd.Function):
    """Stack the equally long tensors of all ranks; its transpose sums, then takes our part."""

    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, part: Tensor) -> Tensor:
        ctx.group, ctx.length = group, len(part)
        whole = part.new_empty(group.size() * len(part), *part.shape[1:])
        with peer_guard("all-gather of dispatch", group):
            dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        total = grad.contiguous().clone()
        with peer_guard("all-reduce of dispatch, backward", ctx.group):
            dist.all_reduce(total, group=ctx.group)
        return None, total[ctx.group.rank() * ctx.length :][: ctx.length]


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose result is used in part by each rank: its transpose is an all-reduce."""

    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, value: Tensor) -> Tensor:
        ctx.group = group
        total = value.clone()
        with peer_guard("all-reduce of combine", group):
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        total = grad.contiguous().clone()
        with peer_guard("all-reduce of combine, backward", ctx.group):
            dist.all_reduce(total, group=ctx.group)
        return None, total


def _padded(part: Tensor, length: int, value: int) -> Tensor:
    rows = length - len(part)
    return torch.nn.functional.pad(part, (0, 0, 0, rows), value=value)
