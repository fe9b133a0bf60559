"""Take over another plan while serving: experts change places between two steps."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.integrations.deepspeed.inference import move_experts
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.plan import Plan
from semantic_ep.plan.schedule import Schedule
from semantic_ep.plan.token_schedule import SchedulePredictor
from semantic_ep.serve.worker import RankWorker


def read_plan(plan: Path, fingerprint: ModelFingerprint) -> Plan:
    """A plan artefact, which must be of the served model.

    Raises:
        ArtifactError: The plan is damaged. FingerprintError: It is of another model.
    """
    loaded = Plan.read(plan)
    loaded.fingerprint.check(fingerprint, what=f"the served model, for {plan},")
    return loaded


def schedules_by_table(worker: RankWorker) -> bool:
    """Whether steps are divided by tables that belong to the placement."""
    slices = worker.model.token_slices
    return slices is not None and isinstance(slices.predictor, SchedulePredictor)


def take_over(
    worker: RankWorker,
    group: ProcessGroup,
    *,
    placement: Placement,
    schedule: Schedule | None = None,
    decode_placement: Placement | None = None,
    decode_schedule: Schedule | None = None,
) -> dict[str, Any]:
    """Exchange experts so that they lie as a placement says; every rank calls this together.

    Outputs do not change: the same experts compute the same tokens elsewhere.

    Args:
        worker: Of this rank.
        group: Its ranks; weights travel over the group of the model's dispatcher.
        placement: The new one.
        schedule: Its tables, where steps are divided by such.
        decode_placement: Of generated tokens, if they have one of their own.
        decode_schedule: Its tables.

    Returns:
        "experts_moved", "bytes_moved" and "sha256" (see `Exchanged`), and "seconds".

    Raises:
        PlacementError: It has other ranks or slots, there are more or fewer placements than in
            use, or weights did not verify; on all ranks alike.
        PeerFailureError: Another rank died.
    """
    start = time.perf_counter()
    worker.model, exchanged = move_experts(worker.model, placement, decode_placement)
    worker.slot_rows_before = worker.model.dispatcher.stats.slot_activations
    if schedule is not None:
        worker.model.token_slices.predictor = SchedulePredictor(schedule=schedule)
    if decode_schedule is not None:
        worker.model.token_slices.decode_predictor = SchedulePredictor(schedule=decode_schedule)
    return {**dataclasses.asdict(exchanged), "seconds": time.perf_counter() - start}
