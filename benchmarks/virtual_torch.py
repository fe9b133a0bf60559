"""What torch does where there are no kernels of ours, for several EP ranks in one process.

`index_select` packs a row a route by destination, an all-to-all moves blocks between the ranks (a
copy each, as everything lies in one memory), `index_select` sorts by slot; and the way back. Where
rows go is worked out beforehand and not timed, which favours this path.

Shapes: T tokens of a rank, D hidden, K top-k, S slots a rank, G ranks, R rows of a rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


class TorchRanks:
    """Dispatch and combine of all ranks for one batch of routes, none of them dropped.

    Args:
        slot: [T, K] global physical slots of every rank's tokens.
        slots_per_rank: S.
    """

    def __init__(self, slot: list[Tensor], slots_per_rank: int) -> None:
        ranks = range(len(slot))
        self._topk = slot[0].shape[1]
        flat = [s.flatten().long() for s in slot]
        packed = [torch.argsort(routes, stable=True) for routes in flat]
        self._token = [order // self._topk for order in packed]
        self._unpack = [torch.argsort(order) for order in packed]
        self._counts = [
            torch.bincount(routes // slots_per_rank, minlength=len(slot)).tolist()
            for routes in flat
        ]
        arrived = self._all_to_all([routes[order] for routes, order in zip(flat, packed)])
        self._by_slot = [torch.argsort(routes, stable=True) for routes in arrived]
        self._unsort = [torch.argsort(order) for order in self._by_slot]
        self._back = [[self._counts[source][rank] for source in ranks] for rank in ranks]

    def dispatch(self, x: list[Tensor]) -> list[Tensor]:
        """[R, D] of every rank, sorted by (slot, source rank, token)."""
        sent = [rows.index_select(0, token) for rows, token in zip(x, self._token)]
        arrived = self._all_to_all(sent)
        return [rows.index_select(0, order) for rows, order in zip(arrived, self._by_slot)]

    def combine(self, y: list[Tensor], weight: list[Tensor]) -> list[Tensor]:
        """[T, D] of every rank: weighted sums of [R, D], in top-k order."""
        sent = [rows.index_select(0, order) for rows, order in zip(y, self._unsort)]
        home = _exchange(sent, self._back)
        out = []
        for rows, order, weight_TK in zip(home, self._unpack, weight):
            routed = rows.index_select(0, order).to(weight_TK.dtype)
            routed_TKD = routed.view(*weight_TK.shape, -1) * weight_TK[..., None]
            out.append(routed_TKD.sum(dim=1).to(rows.dtype))
        return out

    def _all_to_all(self, sent: list[Tensor]) -> list[Tensor]:
        return _exchange(sent, self._counts)


def _exchange(sent: list[Tensor], counts: list[list[int]]) -> list[Tensor]:
    """Block `counts[source][rank]` rows of each source to each rank, in source order."""
    blocks = [rows.split(sizes) for rows, sizes in zip(sent, counts, strict=True)]
    return [torch.cat([block[rank] for block in blocks]) for rank in range(len(sent))]
