"""Layout: in which order a permuted checkpoint stores the experts of each layer.

A checkpoint can be permuted only by a bijection: as many physical slots as logical experts, each
expert once. Engines that read it give EP rank g the slots g * E/G .. (g + 1) * E/G - 1.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from semantic_ep.apply.families import RouterGroups
from semantic_ep.artifacts import ModelFingerprint, read_artifact, write_artifact
from semantic_ep.errors import PlacementError, explain
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.router_groups import mixed_blocks


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """A permutation of the experts of every MoE layer.

    Attributes:
        physical_to_logical_map: [L, E] int32, logical expert in each physical slot.
        fingerprint: The model with its experts in logical order.
        meta: What the writer of a checkpoint needs to restore it; empty for a layout in memory.
        sha256: Hash of the artefact this was read from, "" if it was not.
    """

    physical_to_logical_map: np.ndarray
    fingerprint: ModelFingerprint
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sha256: str = ""

    def __post_init__(self) -> None:
        table = np.ascontiguousarray(self.physical_to_logical_map, dtype=np.int32)
        table.setflags(write=False)
        object.__setattr__(self, "physical_to_logical_map", table)
        shape = (self.fingerprint.num_layers, self.fingerprint.num_experts)
        if table.shape != shape:
            raise PlacementError(
                explain(
                    "the layout does not fit the model",
                    got=f"shape {table.shape}",
                    allowed=f"[layers, experts] = {shape}",
                )
            )
        wrong = np.flatnonzero((np.sort(table, axis=1) != np.arange(shape[1])).any(axis=1))
        if wrong.size:
            raise PlacementError(
                explain(
                    f"layer {self.fingerprint.layer_ids[wrong[0]]} does not hold each expert "
                    "exactly once",
                    do="A permuted checkpoint has one slot an expert; plan without replicas",
                )
            )

    @property
    def logical_to_physical_map(self) -> np.ndarray:
        """[L, E] int32, physical slot of each logical expert."""
        return np.argsort(self.physical_to_logical_map, axis=1).astype(np.int32)

    @classmethod
    def identity(cls, fingerprint: ModelFingerprint) -> Self:
        """The logical order: what training and the Hub use."""
        row = np.arange(fingerprint.num_experts, dtype=np.int32)
        table = np.tile(row, (fingerprint.num_layers, 1))
        return cls(physical_to_logical_map=table, fingerprint=fingerprint)

    @classmethod
    def from_placement(cls, placement: Placement, fingerprint: ModelFingerprint) -> Self:
        """The layout of a placement without replicas and with equally many experts a rank.

        Raises:
            PlacementError: The placement is no bijection, or is not for this model.
        """
        table = placement.physical_to_logical_map
        empty = np.argwhere(table < 0)
        if placement.has_replicas:
            layer, expert = np.argwhere(placement.logical_count > 1)[0]
            problem = (
                f"layer {fingerprint.layer_ids[layer]} has "
                f"{placement.logical_count[layer, expert]} copies of expert {expert}, and a "
                "checkpoint holds each expert once"
            )
        elif empty.size:
            layer, slot = empty[0]
            problem = (
                f"slot {slot} of layer {fingerprint.layer_ids[layer]} is empty, and engines split "
                "the experts of a checkpoint evenly"
            )
        else:
            return cls(physical_to_logical_map=table, fingerprint=fingerprint)
        raise PlacementError(
            explain(
                problem,
                where="placement",
                do="Plan with redundant_slots = 0 and equally many experts a rank, or serve the "
                "plan inside an integration, which needs no permuted checkpoint",
            )
        )

    def check_router(self, groups: RouterGroups | None) -> None:
        """Refuse a permutation that changes what a group-limited router chooses.

        Args:
            groups: The router's limits; None accepts every permutation.

        Raises:
            PlacementError: Naming the first layer, group and experts that are illegal.
        """
        if groups is None:
            return
        mixed = mixed_blocks(self.physical_to_logical_map, groups.num_groups)
        if not mixed.size:
            return
        layer, group = mixed[0]
        size = self.fingerprint.num_experts // groups.num_groups
        experts_S = self.physical_to_logical_map[layer, group * size : (group + 1) * size]
        raise PlacementError(
            explain(
                f"layer {self.fingerprint.layer_ids[layer]}: the router keeps the best "
                f"{groups.topk_group} of {groups.num_groups} groups of {size} neighbouring slots, "
                f"and slots {group * size}..{group * size + size - 1} would mix experts of the "
                f"router groups {np.unique(experts_S // size).tolist()}",
                where="placement",
                got=f"experts {experts_S.tolist()}",
                allowed="permutations of whole groups, or inside a group",
                do=f"Plan with --router-groups {groups.num_groups}, or serve the plan inside an "
                "integration, which remaps ids after the router",
            )
        )

    def placement(self, ep_size: int) -> Placement:
        """The placement that an engine gets when it loads this layout on `ep_size` ranks.

        The number of ranks need not be the one planned for: resharding a permuted checkpoint
        means splitting the same slots into other blocks.

        Raises:
            PlacementError: `ep_size` does not divide the number of experts.
        """
        experts = self.fingerprint.num_experts
        if experts % ep_size:
            raise PlacementError(
                explain(
                    f"ep_size = {ep_size} does not divide num_experts = {experts}",
                    allowed=[size for size in range(1, experts + 1) if experts % size == 0],
                )
            )
        return Placement(
            physical_to_logical_map=self.physical_to_logical_map,
            num_experts=experts,
            ep_size=ep_size,
        )

    def save(self, path: str | os.PathLike[str], parents: Mapping[str, str] | None = None) -> str:
        """Write a `layout` artefact; returns its sha256."""
        return write_artifact(
            path,
            kind="layout",
            fingerprint=self.fingerprint,
            arrays={"physical_to_logical_map": self.physical_to_logical_map},
            meta=self.meta,
            parents=parents,
        )

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read and verify a `layout` artefact."""
        artifact = read_artifact(path, kind="layout")
        return cls(
            physical_to_logical_map=artifact.arrays["physical_to_logical_map"],
            fingerprint=artifact.fingerprint,
            meta=artifact.meta,
            sha256=artifact.sha256,
        )


def relayout(old: Layout, new: Layout) -> np.ndarray:
    """[L, E] int32, the slot of `old` that holds what each slot of `new` will hold.

    With `old` the identity this applies `new`; with `new` the identity it undoes `old`.
    """
    return np.take_along_axis(old.logical_to_physical_map, new.physical_to_logical_map, axis=1)
