"""Attention of sequences that have one new token and read the KV cache where they lie.

One call for each sequence costs more than what a small model computes in it. Sequences of equal
length that lie at equal distances, as those of one batch do, are one strided view of the cache, and
attend in one call.

Shapes: S positions of the cache, J key heads, H query heads, D head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Sequences of equal length at equal distances.

    Attributes:
        begin: First position of the first.
        length: Positions of each.
        distance: Between the first positions of neighbours; 0 of one sequence.
        count: Sequences.
    """

    begin: int
    length: int
    distance: int = 0
    count: int = 1

    def view(self, pool_JSD: Tensor, window: int | None) -> Tensor:
        """[count, J, P, D]: what the sequences' tokens see, no more than a window of it."""
        seen = self.length if window is None else min(self.length, window)
        heads, positions, features = pool_JSD.stride()
        first = pool_JSD.storage_offset() + (self.begin + self.length - seen) * positions
        return pool_JSD.as_strided(
            (self.count, pool_JSD.shape[0], seen, pool_JSD.shape[2]),
            (self.distance * positions, heads, positions, features),
            first,
        )

    def newest(self, pool_JSD: Tensor) -> Tensor:
        """[J, count, D]: the last position of each."""
        return self.view(pool_JSD, window=1)[:, :, 0].movedim(0, 1)


def rows_of(ranges: Iterable[tuple[int, int]]) -> list[Row]:
    """As few rows as neighbours allow, in order.

    Args:
        ranges: First position and end of each sequence, rising.
    """
    rows: list[Row] = []
    for begin, end in ranges:
        last = rows[-1] if rows else None
        if last is not None and last.length == end - begin:
            distance = begin - (last.begin + (last.count - 1) * last.distance)
            if last.count == 1 or distance == last.distance:
                rows[-1] = dataclasses.replace(last, distance=distance, count=last.count + 1)
                continue
        rows.append(Row(begin=begin, length=end - begin))
    return rows


def decode(
    rows: Sequence[Row],
    query_HTD: Tensor,
    pools: tuple[Tensor, Tensor],
    window: int | None,
    scaling: float,
    sink_H: Tensor | None,
) -> Tensor:
    """[T, H, D'] of sequences with one token each, in the order of the rows.

    Args:
        rows: Of T sequences in all.
        query_HTD: Their queries.
        pools: [J, S, D] keys and [J, S, D'] values.
        window: Positions that a query sees, itself included; None: all.
        scaling: Of the scores.
        sink_H: A learned score of attending to nothing (gpt-oss), if there is one.
    """
    heads = len(pools[0])
    # Query heads that share a key head become queries of one sequence.
    query_TJQD = query_HTD.unflatten(0, (heads, -1)).movedim(2, 0)
    one = len(rows) == 1
    parts = [query_TJQD] if one else query_TJQD.split([row.count for row in rows])
    out = []
    for row, query in zip(rows, parts):
        key, value = (row.view(pool, window) for pool in pools)
        if sink_H is None:
            attend = torch.nn.functional.scaled_dot_product_attention
            out.append(attend(query, key, value, scale=scaling))
        else:
            sink_TJQ1 = sink_H.view(1, heads, -1, 1).expand(row.count, -1, -1, -1)
            scores = torch.cat([query @ key.transpose(-1, -2) * scaling, sink_TJQ1], dim=-1)
            out.append(scores.softmax(dim=-1)[..., :-1] @ value)
    return (out[0] if one else torch.cat(out)).flatten(1, 2)
