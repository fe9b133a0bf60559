"""Rows that travel once a (token, rank) pair, and the rows that experts compute.

A rank receives one row for each token that has any route to it. `expand` makes one row of it for
each route, sorted by slot; `reduce` sums the results of a pair's experts into the row that goes
home.

Shapes: Q received pairs, K top-k, R rows of experts (routes), D hidden, S slots a rank.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Expanded:
    """Rows by slot, and the way back to the pairs.

    Attributes:
        row_RD: One row a route, sorted by slot, then in the order of the pairs.
        weight_R: Its combine weight.
        tokens_per_slot_S: int64.
        position_R: Position in the sorted rows of each route, in pair order, then top-k order.
        first_Q: Where each pair begins in `position_R`.
    """

    row_RD: Tensor
    weight_R: Tensor
    tokens_per_slot_S: Tensor
    position_R: Tensor
    first_Q: Tensor


def expand(row_QD: Tensor, weight_QK: Tensor, slot_QK: Tensor, num_slots: int) -> Expanded:
    """One row for each route of each pair.

    Args:
        row_QD: Received rows.
        weight_QK: Their combine weights.
        slot_QK: Their local slots; -1 where a route is not for this rank.
        num_slots: S.
    """
    pair_R, choice_R = (slot_QK >= 0).nonzero(as_tuple=True)
    slot_R = slot_QK[pair_R, choice_R].long()
    order_R = torch.argsort(slot_R, stable=True)
    return Expanded(
        row_RD=row_QD.index_select(0, pair_R[order_R]),
        weight_R=weight_QK[pair_R[order_R], choice_R[order_R]],
        tokens_per_slot_S=torch.bincount(slot_R, minlength=num_slots),
        position_R=_inverse(order_R),
        first_Q=starts(pair_R, len(row_QD)),
    )


def reduce(y_RD: Tensor, weight_R: Tensor, position_R: Tensor, first_Q: Tensor) -> Tensor:
    """Weighted sum of the rows of each pair, in top-k order, rounded once: [Q, D] of y's dtype."""
    dtype = torch.promote_types(y_RD.dtype, weight_R.dtype)
    weight_N = weight_R.to(dtype).index_select(0, position_R)
    return segment_sum(y_RD.to(dtype), position_R, first_Q, weight_N).to(y_RD.dtype)


def hits(rank_TK: Tensor, num_ranks: int) -> Tensor:
    """bool [T, G], which ranks a token has routes to; rank -1 is a dropped route."""
    hit_TG = rank_TK.new_zeros(len(rank_TK), num_ranks + 1, dtype=torch.bool)
    return hit_TG.scatter_(1, torch.where(rank_TK < 0, num_ranks, rank_TK), True)[:, :num_ranks]


def segment_sum(
    value_XD: Tensor, index_N: Tensor, first_M: Tensor, weight_N: Tensor | None = None
) -> Tensor:
    """Sum rows `value[index]` (times weight) of M consecutive segments, each in order: [M, D].

    `embedding_bag` gathers and sums in one pass with one accumulator a segment: the same order on
    every device, unlike scattered additions.
    """
    return torch.nn.functional.embedding_bag(
        index_N, value_XD, first_M, mode="sum", per_sample_weights=weight_N
    )


def starts(segment_N: Tensor, num_segments: int) -> Tensor:
    """Where each segment begins in its non-decreasing list of members."""
    return torch.searchsorted(
        segment_N, torch.arange(num_segments, device=segment_N.device, dtype=segment_N.dtype)
    )


def _inverse(order_N: Tensor) -> Tensor:
    inverse = torch.empty_like(order_N)
    inverse[order_N] = torch.arange(len(order_N), device=order_N.device)
    return inverse
