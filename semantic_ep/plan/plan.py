"""Plan: the artefact that the planner hands to apply, runtime and serve."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from semantic_ep.artifacts import ModelFingerprint, read_artifact, write_artifact
from semantic_ep.errors import ArtifactError, explain
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.schedule import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Where experts live, where tokens and requests run, and what that is worth.

    Attributes:
        placement: Experts of every MoE layer on the slots of G ranks.
        schedule: Lookup tables for the same ranks.
        verdict: JSON-serialisable account of the held-out evaluation.
        fingerprint: The model planned for.
        sha256: Hash of the artefact this was read from, "" if it was not.
    """

    placement: Placement
    schedule: Schedule
    verdict: Mapping[str, Any]
    fingerprint: ModelFingerprint
    sha256: str = ""

    def __post_init__(self) -> None:
        wanted = (self.fingerprint.num_layers, self.fingerprint.num_experts)
        found = (self.placement.num_layers, self.placement.num_experts)
        schedule = (self.schedule.num_layers, self.schedule.ep_size)
        if wanted != found or schedule != (found[0], self.placement.ep_size):
            raise ArtifactError(
                explain(
                    "malformed plan: placement, schedule and model do not fit each other",
                    got=f"(layers, experts) {found} on {self.placement.ep_size} ranks, schedule of "
                    f"(layers, ranks) {schedule}",
                    allowed=f"(layers, experts) {wanted}, equal layers and ranks",
                )
            )

    def save(self, path: str | os.PathLike[str], parents: Mapping[str, str] | None = None) -> str:
        """Write a `plan` artefact; `parents` are the hashes of the profile (and trace) used."""
        arrays = {"physical_to_logical_map": self.placement.physical_to_logical_map}
        arrays |= {f"schedule.{name}": table for name, table in self.schedule.arrays().items()}
        return write_artifact(
            path,
            kind="plan",
            fingerprint=self.fingerprint,
            arrays=arrays,
            meta={"ep_size": self.placement.ep_size, "verdict": dict(self.verdict)},
            parents=parents,
        )

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read and verify a `plan` artefact."""
        artifact = read_artifact(path, kind="plan")
        tables: dict[str, np.ndarray] = {
            name.removeprefix("schedule."): array
            for name, array in artifact.arrays.items()
            if name.startswith("schedule.")
        }
        try:
            return cls(
                placement=Placement(
                    physical_to_logical_map=artifact.arrays["physical_to_logical_map"],
                    num_experts=artifact.fingerprint.num_experts,
                    ep_size=artifact.meta["ep_size"],
                ),
                schedule=Schedule(**tables),
                verdict=artifact.meta["verdict"],
                fingerprint=artifact.fingerprint,
                sha256=artifact.sha256,
            )
        except (KeyError, TypeError) as error:
            raise ArtifactError(
                explain(
                    f"malformed plan: {type(error).__name__}: {error}",
                    where=str(path),
                    do="Make the plan anew",
                )
            ) from error
