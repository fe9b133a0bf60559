"""Gradients of the copies of an expert, summed so that every copy gets the same bits.

Each copy has seen other tokens, and has the gradient of those. The ranks that hold copies send each
other theirs, and each adds them up by itself, in the order of the slots: a sum that does not depend
on which rank computes it, as that of an all-reduce may. Where ranks divide the gradients of the
experts that they share, each brings and gets the piece that it answers for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from semantic_ep.runtime.collectives import from_all_ranks, peer_guard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CopyGradient:
    """A piece of the gradient of one tensor of one copy of an expert.

    Attributes:
        layer: MoE layer; one exchange is made for each.
        name: Of the tensor among those of the expert.
        expert: Logical expert.
        slot: Physical slot of the copy, over the whole EP group.
        values: [N], in place.
        start: Where they begin in the flattened gradient.
    """

    layer: int
    name: str
    expert: int
    slot: int
    values: Tensor
    start: int = 0

    @property
    def place(self) -> _Place:
        """What other ranks need to know of it."""
        return _Place(
            key=(self.layer, str(self.values.dtype), self.expert, self.name),
            slot=self.slot,
            start=self.start,
            end=self.start + len(self.values),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    key: tuple[int, str, int, str]
    slot: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    """Values `start` to `end` of a flattened gradient, which a rank sends or gets.

    Attributes:
        piece: Index of the piece on this rank.
        slot: Of the copy that they come from.
    """

    piece: int
    slot: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Batch:
    """What one exchange moves: parts by peer, and this rank's pieces."""

    dtype: str
    pieces: list[int]
    sent: list[list[_Part]]
    received: list[list[_Part]]


class CopySums:
    """Sums the gradients of copies whenever asked, over ranks that were told once who has what."""

    def __init__(self, pieces: Sequence[CopyGradient], group: ProcessGroup) -> None:
        """Learn what the other ranks have; collective.

        Args:
            pieces: Of this rank: of every tensor of the experts that have copies, without overlap
                within the group.
            group: All ranks that hold pieces of these copies, of a backend that moves their device.
        """
        self._pieces, self._group = pieces, group
        places = [piece.place for piece in pieces]
        everyone = from_all_ranks(places, "agreement on the copies of experts", group)
        self._batches = list(_batches(everyone, group.rank()))
        self._device = torch.device("cuda") if dist.get_backend(group) == "nccl" else None

    def sum(self) -> None:
        """Put the sum over all copies in the place of each; collective.

        Raises:
            PeerFailureError: Another rank died or did not answer in time.
        """
        for batch in self._batches:
            self._sum(batch)

    def _sum(self, batch: _Batch) -> None:
        dtype = getattr(torch, batch.dtype.removeprefix("torch."))
        parts = [self._values(part) for of_peer in batch.sent for part in of_peer]
        device = parts[0].device if parts else self._device
        message = torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=device)
        arriving = [sum(part.end - part.start for part in parts) for parts in batch.received]
        leaving = [sum(part.end - part.start for part in parts) for parts in batch.sent]
        arrived = message.new_empty(sum(arriving))
        with peer_guard("sum of the gradients of copies", self._group):
            dist.all_to_all_single(arrived, message, arriving, leaving, group=self._group)
        received = [part for of_peer in batch.received for part in of_peer]
        theirs = arrived.split([part.end - part.start for part in received])
        of_piece: dict[int, list[tuple[_Part, Tensor]]] = {piece: [] for piece in batch.pieces}
        for part, values in zip(received, theirs, strict=True):
            of_piece[part.piece].append((part, values))
        for piece, others in of_piece.items():
            self._add(self._pieces[piece], others)

    def _values(self, part: _Part) -> Tensor:
        piece = self._pieces[part.piece]
        return piece.values[part.start - piece.start : part.end - piece.start]

    def _add(self, own: CopyGradient, others: list[tuple[_Part, Tensor]]) -> None:
        exact = torch.promote_types(own.values.dtype, torch.float32)
        total = torch.zeros_like(own.values, dtype=exact)
        mine = _Part(piece=0, slot=own.slot, start=own.start, end=own.start + len(own.values))
        for part, values in sorted([*others, (mine, own.values)], key=lambda of: of[0].slot):
            total[part.start - own.start : part.end - own.start] += values
        own.values.copy_(total)


def _batches(everyone: Sequence[Sequence[_Place]], me: int) -> Iterator[_Batch]:
    """The exchanges of a rank, one for each layer and kind of number, the same on all ranks."""
    by_batch: dict[tuple[int, str], dict[Any, list[tuple[int, int, _Place]]]] = {}
    for rank, places in enumerate(everyone):
        for number, place in enumerate(places):
            by_key = by_batch.setdefault(place.key[:2], {})
            by_key.setdefault(place.key, []).append((rank, number, place))
    for (_, dtype), by_key in sorted(by_batch.items()):
        sent: list[list[_Part]] = [[] for _ in everyone]
        received: list[list[_Part]] = [[] for _ in everyone]
        # All ranks go through the pairs in this order, so that both ends list the same parts.
        for _, holders in sorted(by_key.items()):
            for source, from_piece, theirs in holders:
                for target, to_piece, ours in holders:
                    start, end = max(theirs.start, ours.start), min(theirs.end, ours.end)
                    if theirs.slot == ours.slot or start >= end:
                        continue
                    part = _Part(piece=from_piece, slot=theirs.slot, start=start, end=end)
                    if source == me:
                        sent[target].append(part)
                    if target == me:
                        received[source].append(dataclasses.replace(part, piece=to_piece))
        mine = [number for holders in by_key.values() for rank, number, _ in holders if rank == me]
        yield _Batch(dtype=dtype, pieces=mine, sent=sent, received=received)
