"""Placement: which logical expert each physical slot holds.

Vocabulary and layout of the maps are those of EPLB and SGLang. A placement relabels experts; it
never reorders ranks. Physical slot s of a layer lives on EP rank s // S, where S is the number of
slots a rank has.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np

from semantic_ep.errors import PlacementError, explain


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """A validated assignment of logical experts to the slots of G ranks.

    Attributes:
        physical_to_logical_map: [L, G * S] int32, logical expert of each slot; -1 is an empty slot.
        num_experts: Logical experts a layer (E).
        ep_size: EP ranks (G).
    """

    physical_to_logical_map: np.ndarray
    num_experts: int
    ep_size: int

    def __post_init__(self) -> None:
        table = np.ascontiguousarray(self.physical_to_logical_map, dtype=np.int32)
        table.setflags(write=False)
        object.__setattr__(self, "physical_to_logical_map", table)
        if table.ndim != 2 or table.shape[1] % self.ep_size:
            raise PlacementError(
                explain(
                    "physical_to_logical_map must be [layers, ep_size * slots a rank]",
                    got=f"shape {table.shape} for ep_size {self.ep_size}",
                )
            )
        for layer, row in enumerate(table):
            self._check_layer(layer, row)

    def _check_layer(self, layer: int, row: np.ndarray) -> None:
        if row.min() < -1 or row.max() >= self.num_experts:
            raise PlacementError(
                explain(
                    f"layer {layer} names an expert that does not exist",
                    got=f"{int(row.max() if row.max() >= self.num_experts else row.min())}",
                    allowed=f"0..{self.num_experts - 1}, or -1 for an empty slot",
                )
            )
        missing = np.setdiff1d(np.arange(self.num_experts), row)
        if missing.size:
            raise PlacementError(
                explain(f"layer {layer} places no copy of experts {missing[:8].tolist()}")
            )
        for rank, slots in enumerate(row.reshape(self.ep_size, -1)):
            held = slots[slots >= 0]
            if len(np.unique(held)) != len(held):
                raise PlacementError(
                    explain(f"layer {layer}, rank {rank} holds two copies of one expert")
                )

    @property
    def num_layers(self) -> int:
        """Number of MoE layers (L)."""
        return len(self.physical_to_logical_map)

    @property
    def slots_per_rank(self) -> int:
        """Physical slots a rank has in a layer (S)."""
        return int(self.physical_to_logical_map.shape[1]) // self.ep_size

    @property
    def has_replicas(self) -> bool:
        """Whether any expert has more than one copy."""
        return bool((self.logical_count > 1).any())

    @cached_property
    def logical_count(self) -> np.ndarray:
        """[L, E] int32, copies of each expert."""
        counts = [np.bincount(row[row >= 0], minlength=self.num_experts) for row in self._rows]
        return np.stack(counts).astype(np.int32)

    @cached_property
    def logical_to_physical_map(self) -> np.ndarray:
        """[L, E, copies] int32, slots of each expert in rising order, padded with -1."""
        copies = int(self.logical_count.max())
        table = np.full((self.num_layers, self.num_experts, copies), -1, dtype=np.int32)
        for layer, row in enumerate(self._rows):
            used = np.flatnonzero(row >= 0)
            order = used[np.argsort(row[used], kind="stable")]
            experts = row[order]
            first = np.searchsorted(experts, experts)
            table[layer, experts, np.arange(len(order)) - first] = order
        return table

    @cached_property
    def copy_of_slot(self) -> np.ndarray:
        """[L, G * S] int32, how many slots before it hold the same expert; 0 for an empty slot."""
        copies = np.zeros_like(self.physical_to_logical_map)
        for number in range(1, self.logical_to_physical_map.shape[2]):
            layer, expert = np.nonzero(self.logical_to_physical_map[:, :, number] >= 0)
            copies[layer, self.logical_to_physical_map[layer, expert, number]] = number
        return copies

    @cached_property
    def first_copies(self) -> Placement:
        """The first copy of each expert alone; slots of further copies are empty."""
        return dataclasses.replace(
            self,
            physical_to_logical_map=np.where(
                self.copy_of_slot > 0, -1, self.physical_to_logical_map
            ),
        )

    @cached_property
    def expert_on_rank(self) -> np.ndarray:
        """[L, E, G] bool, whether a rank holds a copy of an expert."""
        held = np.zeros((self.num_layers, self.num_experts, self.ep_size), dtype=bool)
        layer, slot = np.nonzero(self.physical_to_logical_map >= 0)
        expert = self.physical_to_logical_map[layer, slot]
        held[layer, expert, slot // self.slots_per_rank] = True
        return held

    @property
    def rank_of_expert(self) -> np.ndarray:
        """[L, E] int32, rank of each expert's first copy (the only one without replicas)."""
        return self.logical_to_physical_map[:, :, 0] // self.slots_per_rank

    def experts_of_rank(self, layer: int, rank: int) -> np.ndarray:
        """[S] logical experts in the slots of a rank, -1 for an empty slot."""
        slots = self.slots_per_rank
        return self.physical_to_logical_map[layer, rank * slots : (rank + 1) * slots]

    @property
    def _rows(self) -> np.ndarray:
        return self.physical_to_logical_map

    @classmethod
    def contiguous(cls, *, num_layers: int, num_experts: int, ep_size: int) -> Placement:
        """The placement of upstream runtimes: rank g holds experts g * E/G .. (g + 1) * E/G - 1."""
        if num_experts % ep_size:
            raise PlacementError(
                explain(
                    f"ep_size = {ep_size} does not divide num_experts = {num_experts}",
                    allowed=[n for n in range(1, num_experts + 1) if num_experts % n == 0],
                    do='Set "groups.ep_size" or --semantic-ep-groups-ep-size',
                )
            )
        row = np.arange(num_experts, dtype=np.int32)
        return cls(
            physical_to_logical_map=np.tile(row, (num_layers, 1)),
            num_experts=num_experts,
            ep_size=ep_size,
        )

    @classmethod
    def from_rank_of_expert(cls, rank_of_expert: np.ndarray, *, ep_size: int) -> Placement:
        """Build from [L, E] ranks, without replicas; experts of a rank in rising order.

        Ranks may hold different numbers of experts; smaller ones are padded with empty slots.
        """
        rank_of_expert = np.asarray(rank_of_expert)
        layers, experts = rank_of_expert.shape
        if rank_of_expert.min() < 0 or rank_of_expert.max() >= ep_size:
            raise PlacementError(
                explain("an expert is on a rank that does not exist", allowed=f"0..{ep_size - 1}")
            )
        counts = np.stack([np.bincount(row, minlength=ep_size) for row in rank_of_expert])
        slots = int(counts.max())
        table = np.full((layers, ep_size, slots), -1, dtype=np.int32)
        order = np.argsort(rank_of_expert, axis=1, kind="stable")
        for layer in range(layers):
            ranks = rank_of_expert[layer, order[layer]]
            within = np.arange(experts) - np.searchsorted(ranks, ranks)
            table[layer, ranks, within] = order[layer]
        return cls(
            physical_to_logical_map=table.reshape(layers, -1), num_experts=experts, ep_size=ep_size
        )
