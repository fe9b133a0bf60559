"""The planner's verdict as a section of the report."""

from __future__ import annotations

from typing import Any

from semantic_ep.artifacts import MANIFEST
from semantic_ep.errors import ArtifactError, explain
from semantic_ep.plan.plan import Plan
from semantic_ep.report.sources import PLAN_DIR

_SCHEDULED = {
    "requests": "whole requests get a rank, predicted from their token ids",
    "tokens": "each token gets a rank in each layer, predicted from its id",
}
_NEEDED = (
    *("ep_size", "mode", "tokens", "held_out", "policies"),
    *("remote_copies_saved", "worth_it", "summary", "best_baseline", "bounds"),
)


def planned(plan: Plan) -> dict[str, Any]:
    """Return the verdict with its source; see `semantic_ep.plan.verdict.verdict` for the fields.

    Raises:
        ArtifactError: The plan was saved without a verdict, or with one of another form.
    """
    verdict = dict(plan.verdict)
    missing = [name for name in _NEEDED if name not in verdict]
    if missing or verdict["mode"] not in _SCHEDULED or not verdict["policies"]:
        raise ArtifactError(
            explain(
                "the verdict of this plan cannot be read",
                where=f"{PLAN_DIR}/{MANIFEST}",
                got=f"no {', '.join(missing)}" if missing else f"mode {verdict['mode']}",
                do="Plan again with this version of semantic_ep",
            )
        )
    return {
        "source": f"{PLAN_DIR}/{MANIFEST}",
        **verdict,
        "what_is_scheduled": _SCHEDULED[verdict["mode"]],
    }
