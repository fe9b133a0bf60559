"""Plan diffs: how far the placements of two runs are apart, as moves of experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from semantic_ep.artifacts import is_artifact
from semantic_ep.errors import FingerprintError, PlacementError
from semantic_ep.plan.moving import count_moves, relabel_ranks
from semantic_ep.plan.plan import Plan
from semantic_ep.report.sources import PLAN_DIR
from semantic_ep.topology import Topology


def plan_diffs(runs: Sequence[Path]) -> list[dict[str, Any] | None]:
    """Compare each run's plan with that of the first run that has one.

    Ranks are renamed first so that fewest experts move: two plans that differ in the numbers of
    ranks alone are one plan. The naming is one for all layers, as schedules of whole requests need.

    Returns:
        For each run `{"against": index of the first run, "moved": [L] expert copies that a rank
        must receive, "layer_ids": [L], "share": of all slots}`, or `{"against", "why_not"}` for
        another model or number of ranks; None for a run without a plan, and for the first.
    """
    plans = [
        Plan.read(run / PLAN_DIR) if is_artifact(run / PLAN_DIR, kind="plan") else None
        for run in runs
    ]
    first = next((index for index, plan in enumerate(plans) if plan is not None), None)
    return [
        None
        if plan is None or first is None or index == first
        else _diff(plan, plans[first], first)
        for index, plan in enumerate(plans)
    ]


def _diff(plan: Plan, base: Plan | None, against: int) -> dict[str, Any]:
    assert base is not None
    try:
        base.fingerprint.check(plan.fingerprint, what="the plan", allow_retrained=True)
        topology = Topology.uniform(base.placement.ep_size)
        renamed = relabel_ranks(plan.placement, base.placement, shared_ranks=True)
        moves = count_moves(renamed, base.placement, bytes_per_expert=1, topology=topology)
    except (FingerprintError, PlacementError):
        return {"against": against, "why_not": "another model or number of ranks"}
    return {
        "against": against,
        "moved": moves.copies.tolist(),
        "layer_ids": list(base.fingerprint.layer_ids),
        "share": float(moves.copies.sum() / base.placement.physical_to_logical_map.size),
    }
