"""Experts exchanged among the ranks of an EP group when the placement changes.

`expert_moves` is arithmetic on placements. `exchange_experts` carries it out on any tensors that
have one row a slot, together or apart: weights, or optimizer state with them. New contents are
received beside the old, verified against checksums of the logical experts, and only then copied
into the slots; if any rank disagrees nothing changes on any. What is needed besides the tensors is
room for the rows of this rank that change.

Shapes: L MoE layers, E logical experts, S slots of this rank.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from semantic_ep.errors import PlacementError, explain
from semantic_ep.plan.placement import Placement
from semantic_ep.runtime.collectives import peer_guard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SlotTensors = Sequence[Mapping[str, Tensor | Sequence[Tensor]]]
"""For each layer here, by name, a tensor of S rows, or the S rows: one a slot of this rank."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Move:
    """One slot gets another expert; slots are local to their rank."""

    layer: int
    expert: int
    source_rank: int
    source_slot: int
    target_rank: int
    target_slot: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchanged:
    """What an exchange did, in all layers.

    Attributes:
        experts_moved: Slots of an EP group that were filled from another slot.
        bytes_moved: Contents that went to another rank of it.
        sha256: Of the checksums of all logical experts, the same before and after.
    """

    experts_moved: int
    bytes_moved: int
    sha256: str


def expert_moves(old: Placement, new: Placement) -> list[Move]:
    """Moves that turn one placement into another, by layer, then target slot.

    A copy on the target's own rank is the source if there is one; else ranks spread over the
    holders. A slot that the new placement leaves empty keeps what it had.

    Raises:
        PlacementError: The placements have different layers, experts, ranks or slots.
    """
    shapes = [(p.num_layers, p.num_experts, p.ep_size, p.slots_per_rank) for p in (old, new)]
    if shapes[0] != shapes[1]:
        raise PlacementError(
            explain(
                "experts cannot be exchanged between placements of different shape",
                got=f"(layers, experts, ranks, slots a rank) {shapes[1]}",
                allowed=str(shapes[0]),
                do="Plan with the same --ep-size and --redundant-slots, or start anew",
            )
        )
    slots = old.slots_per_rank
    changed = (old.physical_to_logical_map != new.physical_to_logical_map) & (
        new.physical_to_logical_map >= 0
    )
    moves = []
    for layer, target in np.argwhere(changed).tolist():
        expert = int(new.physical_to_logical_map[layer, target])
        holders = np.flatnonzero(old.physical_to_logical_map[layer] == expert)
        own = holders[holders // slots == target // slots]
        source = int(own[0] if len(own) else holders[target // slots % len(holders)])
        moves.append(
            Move(
                layer=layer,
                expert=expert,
                source_rank=source // slots,
                source_slot=source % slots,
                target_rank=target // slots,
                target_slot=target % slots,
            )
        )
    return moves


def exchange_experts(
    tensors: SlotTensors,
    *,
    old: Placement,
    new: Placement,
    group: ProcessGroup,
    together: ProcessGroup | None = None,
    layers: Sequence[int] | None = None,
) -> Exchanged:
    """Bring the experts of `new` into the slots, in place; every rank of the group calls this.

    Args:
        tensors: As `old` has them; names, shapes and dtypes are equal on all ranks.
        old: Where experts are.
        new: Where they shall be.
        group: The EP group, of a backend that moves the tensors' device.
        together: Ranks that change together or not at all, where that is more than one EP group,
            as when several train the same experts or have other layers; all of them call this.
        layers: Layers that `tensors` are of, where this group has not all; None for all. The
            groups of `together` have all between them.

    Raises:
        PlacementError: Shapes differ, or copies or moved weights do not agree with their
            checksum. Nothing has changed on any rank then.
        PeerFailureError: Another rank died or did not answer in time; nothing has changed here.
    """
    moves = expert_moves(old, new)
    rank = group.rank()
    together = group if together is None else together
    here = range(old.num_layers) if layers is None else layers
    own = _checksums(tensors, old, rank, here)
    before = _reduced(own, dist.ReduceOp.MAX, group)
    copies = own != _ABSENT
    _agree(bool((own[copies] == before[copies]).all()), together, "before the exchange")
    width = torch.zeros(old.num_layers, 1, dtype=torch.int64)
    for layer, layer_tensors in zip(here, tensors, strict=True):
        width[layer] = _row_bytes(layer_tensors)
    # Of the layers here; others know the rest.
    known = torch.cat([before, width], dim=1)
    if layers is not None:
        known = _reduced(known, dist.ReduceOp.MAX, together)
    staged = [
        _receive_layer(layer_tensors, [m for m in moves if m.layer == layer], group)
        for layer, layer_tensors in zip(here, tensors, strict=True)
    ]
    arrived = _checksums(tensors, new, rank, here, staged)
    held = arrived != _ABSENT
    _agree(bool((arrived[held] == before[held]).all()), together, "after the exchange")
    for layer_tensors, rows_of_slot in zip(tensors, staged, strict=True):
        for slot, rows in rows_of_slot.items():
            for name, row in rows.items():
                layer_tensors[name][slot].detach().copy_(row)
    away = [m for m in moves if m.source_rank != m.target_rank]
    return Exchanged(
        experts_moved=len(moves),
        bytes_moved=sum(int(known[m.layer, -1]) for m in away),
        sha256=hashlib.sha256(known[:, :-1].contiguous().numpy().tobytes()).hexdigest(),
    )


def fill_copies(
    tensors: Mapping[str, Tensor | Sequence[Tensor]],
    *,
    placement: Placement,
    layer: int,
    group: ProcessGroup,
) -> None:
    """Give all copies of an expert what the first of them holds, in place; collective.

    Args:
        tensors: Of the layer, as in `exchange_experts`.
        placement: With several copies of some experts.
        layer: 0..L - 1.
        group: The EP group, of a backend that moves the tensors' device.

    Raises:
        PeerFailureError: Another rank died or did not answer in time.
    """
    slots = placement.slots_per_rank
    moves = [
        Move(
            layer=layer,
            expert=expert,
            source_rank=first // slots,
            source_slot=first % slots,
            target_rank=copy // slots,
            target_slot=copy % slots,
        )
        for expert, (first, *copies) in enumerate(placement.logical_to_physical_map[layer].tolist())
        for copy in copies
        if copy >= 0
    ]
    for slot, rows in _receive_layer(tensors, moves, group).items():
        for name, row in rows.items():
            tensors[name][slot].detach().copy_(row)


_ABSENT = torch.iinfo(torch.int64).min


def _receive_layer(
    tensors: Mapping[str, Tensor | Sequence[Tensor]], moves: Sequence[Move], group: ProcessGroup
) -> dict[int, dict[str, Tensor]]:
    """Exchange the rows of one layer: {slot: {name: row}} of the slots that change here."""
    rank, ranks, width = group.rank(), group.size(), _row_bytes(tensors)
    sent = sorted((m for m in moves if m.source_rank == rank), key=lambda m: m.target_rank)
    received = sorted((m for m in moves if m.target_rank == rank), key=lambda m: m.source_rank)
    device = next(iter(tensors.values()))[0].device
    # The sort is stable, so that both ends list the rows between two ranks in the same order.
    rows = [
        torch.cat(
            [t[m.source_slot].detach().reshape(-1).view(torch.uint8) for t in tensors.values()]
        )
        for m in sent
    ]
    message = torch.cat(rows) if rows else torch.empty(0, dtype=torch.uint8, device=device)
    buffer = torch.empty(len(received) * width, dtype=torch.uint8, device=device)
    arriving = np.bincount([m.source_rank for m in received], minlength=ranks) * width
    leaving = np.bincount([m.target_rank for m in sent], minlength=ranks) * width
    with peer_guard("exchange of experts", group):
        dist.all_to_all_single(buffer, message, arriving.tolist(), leaving.tolist(), group=group)
    return {
        move.target_slot: _unpacked(buffer[number * width : (number + 1) * width], tensors)
        for number, move in enumerate(received)
    }


def _unpacked(
    content: Tensor, tensors: Mapping[str, Tensor | Sequence[Tensor]]
) -> dict[str, Tensor]:
    """Rows of one slot from their bytes."""
    rows, at = {}, 0
    for name, tensor in tensors.items():
        like = tensor[0]
        end = at + like.numel() * like.element_size()
        # A copy: the bytes of a row may begin where its dtype cannot.
        rows[name] = content[at:end].clone().view(like.dtype).view(like.shape)
        at = end
    return rows


def _row_bytes(tensors: Mapping[str, Tensor | Sequence[Tensor]]) -> int:
    return sum(t[0].numel() * t[0].element_size() for t in tensors.values())


def _checksums(
    tensors: SlotTensors,
    placement: Placement,
    rank: int,
    layers: Sequence[int],
    staged: Sequence[Mapping[int, Mapping[str, Tensor]]] | None = None,
) -> Tensor:
    """[L, E] int64 on the host, of the experts in this rank's slots; `_ABSENT` for the others."""
    sums = torch.full((placement.num_layers, placement.num_experts), _ABSENT)
    for number, (layer, layer_tensors) in enumerate(zip(layers, tensors, strict=True)):
        for slot, expert in enumerate(placement.experts_of_rank(layer, rank).tolist()):
            if expert >= 0:
                rows = staged[number].get(slot) if staged else None
                if rows is None:
                    rows = {name: t[slot].detach() for name, t in layer_tensors.items()}
                sums[layer, expert] = _checksum(rows)
    return sums


def _checksum(rows: Mapping[str, Tensor]) -> int:
    """Of all bits, and of their order: a sum modulo 2^63 with odd weights, so never `_ABSENT`."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = 0
    for number, row in enumerate(rows.values()):
        bits = row.contiguous().view(-1).view(integers[row.element_size()]).to(torch.int64)
        weight = torch.arange(len(bits), device=bits.device) * 2 + 1
        total += int((bits * weight).sum()) * (2 * number + 1)
    return total % 2**63


def _agree(fine: bool, group: ProcessGroup, when: str) -> None:
    if not int(_reduced(torch.tensor(int(fine)), dist.ReduceOp.MIN, group)):
        raise PlacementError(
            explain(
                f"copies of an expert differ {when}; the placement is unchanged",
                where="exchange of experts",
                do="Restart from the checkpoint: the weights of some rank are damaged",
            )
        )


def _reduced(values: Tensor, operation: dist.ReduceOp, group: ProcessGroup) -> Tensor:
    backend = dist.get_backend(group)
    moved = values.to("cuda" if backend == "nccl" else "cpu", copy=True)
    with peer_guard("agreement on an exchange of experts", group):
        dist.all_reduce(moved, operation, group=group)
    return moved.cpu()
