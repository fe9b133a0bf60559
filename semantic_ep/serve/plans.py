"""The plans that a server follows: one for all tokens, or one for each phase."""

from __future__ import annotations

import dataclasses

from semantic_ep.plan.placement import Placement
from semantic_ep.plan.plan import Plan
from semantic_ep.plan.schedule import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingPlans:
    """Plans that a server follows.

    Attributes:
        plan: Of all tokens, or of those of prompts; None: contiguous, and no affinity.
        decode: Of generated tokens, if they have one of their own.
    """

    plan: Plan | None = None
    decode: Plan | None = None

    @property
    def schedule(self) -> Schedule | None:
        """Of all tokens, or of those of prompts."""
        return None if self.plan is None else self.plan.schedule

    @property
    def decode_schedule(self) -> Schedule | None:
        """Of generated tokens, if they have one of their own."""
        return None if self.decode is None else self.decode.schedule

    @property
    def decode_placement(self) -> Placement | None:
        """Of generated tokens, if they have one of their own."""
        return None if self.decode is None else self.decode.placement
