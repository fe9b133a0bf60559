"""Two placements in force at once: one for tokens of prompts, one for generated tokens.

Prompts and generated tokens can want different experts together. Ranks then hold what either
placement puts on them, an expert that both do once, and every token follows the placement of its
phase, except that an expert which its own rank holds anyway is used there.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import numpy as np

from semantic_ep.errors import PlacementError, explain
from semantic_ep.plan.moving import check_alike, keep_slots
from semantic_ep.plan.placement import Placement


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PhasePlacements:
    """Placements of the two phases, and what ranks hold for them.

    Attributes:
        prefill: Of tokens of prompts.
        decode: Of generated tokens.
        resident: Every rank's experts of both; ranks with fewer than others have empty slots.
    """

    prefill: Placement
    decode: Placement
    resident: Placement

    @classmethod
    def of(cls, prefill: Placement, decode: Placement, *, current: Placement | None = None) -> Self:
        """Lay out the experts of both.

        Args:
            prefill: Of tokens of prompts.
            decode: Of generated tokens, for the same model and ranks.
            current: What ranks hold now: they get as many slots, and experts stay in theirs.

        Raises:
            PlacementError: The placements are of different models or ranks, or ranks have too few
                slots for both.
        """
        check_alike(prefill, decode)
        if current is not None:
            check_alike(prefill, current)
        held_LEG = prefill.expert_on_rank | decode.expert_on_rank
        needed = int(held_LEG.sum(axis=1).max())
        slots = needed if current is None else current.slots_per_rank
        if needed > slots:
            raise PlacementError(
                explain(
                    "a rank would hold more experts for both phases than it has slots",
                    got=f"{needed} experts on one rank",
                    allowed=f"at most {slots}",
                    do="Plan the one with the other as --current, or start anew",
                )
            )
        layers, experts, ranks = held_LEG.shape
        table = np.full((layers, ranks, slots), -1, dtype=np.int32)
        for layer in range(layers):
            for rank in range(ranks):
                held = np.flatnonzero(held_LEG[layer, :, rank])
                table[layer, rank, : len(held)] = held
                if current is not None:
                    table[layer, rank] = keep_slots(
                        table[layer, rank], current.experts_of_rank(layer, rank)
                    )
        resident = Placement(
            physical_to_logical_map=table.reshape(layers, -1), num_experts=experts, ep_size=ranks
        )
        return cls(prefill=prefill, decode=decode, resident=resident)

    def serving(self, rank: int) -> tuple[Placement, Placement]:
        """What of `resident` serves one rank's tokens of prompts, and its generated ones.

        Of the experts that are elsewhere only the copies of the phase's own placement do, so that
        the experts which it keeps together are met together; slots that do not serve are empty.
        """
        return self._of(self.prefill, rank), self._of(self.decode, rank)

    def _of(self, placement: Placement, rank: int) -> Placement:
        resident, layers = self.resident, np.arange(placement.num_layers)[:, None]
        slots = resident.physical_to_logical_map
        slot_rank = np.arange(slots.shape[1]) // resident.slots_per_rank
        # An empty slot names expert -1, which is masked again.
        serves = placement.expert_on_rank[layers, slots, slot_rank] | (slot_rank == rank)
        return Placement(
            physical_to_logical_map=np.where(serves, slots, -1),
            num_experts=resident.num_experts,
            ep_size=resident.ep_size,
        )
