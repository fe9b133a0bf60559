"""Weights and optimizer state of the experts of this rank, as rows of slots to be exchanged.

An optimizer keeps the state of a parameter whole, or only a piece of it where ranks that train the
same experts divide the state among them. Pieces do not end where experts do, so they are put
together for the exchange, and taken apart after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from semantic_ep.errors import PlacementError, explain
from semantic_ep.runtime.collectives import from_all_ranks


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """What an optimizer holds here of one state of one parameter.

    Attributes:
        values: [N], in the optimizer's own memory.
        start: Where they begin in the flattened parameter.
    """

    values: Tensor
    start: int = 0


Pieces = Mapping[str, Piece]
"""By the optimizer's name of the state, such as exp_avg."""


def whole_states(states: Mapping[str, Any], shape: torch.Size) -> dict[str, Piece]:
    """Pieces of a parameter whose state is kept whole.

    Args:
        states: As in `torch.optim.Optimizer.state`; numbers are left out: all share them.
        shape: Of the parameter.

    Raises:
        PlacementError: A state has another shape, so that it does not tell experts apart.
    """
    pieces = {}
    for name, value in states.items():
        if not isinstance(value, Tensor) or value.numel() == 1:
            continue
        if value.shape != shape:
            raise PlacementError(
                explain(
                    f"the optimizer's state {name} is not laid out as the parameter, and cannot be "
                    "divided by expert",
                    got=f"shape {tuple(value.shape)}",
                    allowed=f"{tuple(shape)}",
                    do="Unset semantic_ep.replan.interval, or use an optimizer such as Adam or SGD",
                )
            )
        pieces[name] = Piece(values=value.detach().view(-1))
    return pieces


def agreed_kinds(pieces: Sequence[Pieces]) -> dict[str, torch.dtype]:
    """States that any rank holds of any parameter, with their dtypes; collective over all ranks."""
    mine = {name: piece.values.dtype for of_one in pieces for name, piece in of_one.items()}
    everyone = from_all_ranks(mine, "agreement on the optimizer's states")
    return {name: kinds[name] for kinds in everyone for name in sorted(kinds)}


class ExpertState:
    """Rows of the experts here, by layer and name: weights, and optimizer state beside them.

    Attributes:
        rows: As `exchange_experts` takes them.
    """

    def __init__(
        self, num_layers: int, kinds: Mapping[str, torch.dtype], shards: dist.ProcessGroup | None
    ) -> None:
        """Start without an expert.

        Args:
            num_layers: L.
            kinds: See `agreed_kinds`.
            shards: Ranks that divide the state of the same experts; None where each has it whole.
        """
        self.rows: list[dict[str, Tensor | Sequence[Tensor]]] = [{} for _ in range(num_layers)]
        self._kinds = kinds
        self._shards = shards
        self._gathered: list[tuple[Piece, Tensor]] = []

    def add(
        self, layer: int, name: str, weights: Tensor | Sequence[Tensor], pieces: Sequence[Pieces]
    ) -> None:
        """Take in a parameter of the experts of a layer; collective over the shards.

        Args:
            layer: 0..L - 1.
            name: Of the parameter in its layer.
            weights: A parameter of S rows, or the S parameters.
            pieces: Of the parameter, or of each of the S; none of a buffer, which has no state.
        """
        self.rows[layer][name] = weights
        apart = not isinstance(weights, Tensor)
        for kind, dtype in self._kinds.items() if pieces else ():
            found = [of_one.get(kind) for of_one in pieces]
            if not self._divided:
                if not any(found):  # Not trained.
                    continue
                _check_complete(found, f"layer {layer}, {name}", kind)
            wholes = [
                self.whole(like.shape, like.device, piece, dtype)
                for like, piece in zip(weights if apart else [weights], found, strict=True)
            ]
            self.rows[layer][f"{name}/{kind}"] = wholes if apart else wholes[0]

    def store(self) -> None:
        """Bring what the exchange changed back to where the optimizer keeps it."""
        for piece, whole in self._gathered:
            piece.values.copy_(whole.view(-1)[piece.start : piece.start + len(piece.values)])

    @property
    def _divided(self) -> bool:
        return self._shards is not None and self._shards.size() > 1

    def whole(
        self, shape: torch.Size, device: torch.device, piece: Piece | None, dtype: torch.dtype
    ) -> Tensor:
        """What the shards have pieces of, in place or put together; collective over the shards.

        Args:
            shape: Of the whole.
            device: That it shall be on.
            piece: Held here, if any; where there are no shards, all of it.
            dtype: Of the pieces.
        """
        if not self._divided:
            assert piece is not None
            if piece.values.device == device:
                return piece.values.view(shape)
            # On the host, where the optimizer is.
            moved = piece.values.to(device).view(shape)
            self._gathered.append((piece, moved))
            return moved
        whole = torch.zeros(shape, dtype=dtype, device=device)
        if piece is not None:
            whole.view(-1)[piece.start : piece.start + len(piece.values)] = piece.values
            self._gathered.append((piece, whole))
        # One rank has each value, and the others a zero.
        dist.all_reduce(whole, group=self._shards)
        return whole


def _check_complete(found: Sequence[Piece | None], where: str, kind: str) -> None:
    missing = [slot for slot, piece in enumerate(found) if piece is None]
    if missing:
        raise PlacementError(
            explain(
                f"the optimizer has no {kind} of the experts in slots {missing}, and has that of "
                "others, so that they cannot change places",
                where=where,
                do="Give every expert a gradient in every step, if only of zeros",
            )
        )


def expert_bytes(
    rows: Sequence[Tensor | Sequence[Tensor]], kinds: Mapping[str, torch.dtype]
) -> int:
    """Bytes of one expert of one layer: its weights and their states.

    Args:
        rows: The parameters and buffers of a layer: of S rows each, or S of each.
        kinds: See `agreed_kinds`.
    """
    states = sum(dtype.itemsize for dtype in kinds.values())
    return sum(
        of_slots[0].numel() * (of_slots[0].element_size() + is_trained(of_slots) * states)
        for of_slots in rows
    )


def is_trained(of_slots: Tensor | Sequence[Tensor]) -> bool:
    """Whether these are parameters, and not buffers."""
    return isinstance(of_slots if isinstance(of_slots, Tensor) else of_slots[0], nn.Parameter)
