"""Attention-TP at run time: from a predictor's scores to a home rank for each token of a step.

Slices need not be exactly equal there: collectives are padded to ceil(N / G) rows a rank, so a
step of one token may run on any rank.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from semantic_ep.plan.placement import Placement
from semantic_ep.plan.predictors import Context
from semantic_ep.plan.schedule import Schedule
from semantic_ep.plan.slices import equal_slices


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulePredictor:
    """The token -> rank tables of a plan as a `Predictor`.

    The tables hold for the placement they were made with, whatever placement is asked about.

    Attributes:
        schedule: Of the plan in use.
    """

    schedule: Schedule

    @property
    def name(self) -> str:
        """Name in tables."""
        return "plan's token table"

    def rank_scores(self, context: Context, placement: Placement) -> np.ndarray:
        """[T, G] expected share of activations; even for ids that the tables do not know."""
        ids, ranks = context.token_id, self.schedule.ep_size
        known = (ids >= 0) & (ids < self.schedule.vocab_size)
        rank_T = np.where(known, self.schedule.token_to_rank[context.layer][ids * known], -1)
        share_T = self.schedule.confidence[context.layer][ids * known] / 255
        share_T = np.where(rank_T >= 0, share_T, 1 / ranks)
        scores = np.repeat((1 - share_T)[:, None] / max(ranks - 1, 1), ranks, axis=1)
        scores[np.arange(len(ids)), rank_T] = share_T
        return scores


def home_ranks(scores: np.ndarray) -> np.ndarray:
    """Choose a home rank for every token of a step, at most ceil(T / G) tokens a rank.

    Args:
        scores: [T, G], or [L, T, G] for layers by themselves: gain of a token on each rank.

    Returns:
        [T] or [L, T] int64 of maximal total score.
    """
    *layers, tokens, ranks = scores.shape
    # Tokens that do not care fill the slices up.
    nobody = np.zeros((*layers, -tokens % ranks, ranks))
    home: np.ndarray = equal_slices(np.concatenate([scores, nobody], axis=-2))
    return home[..., :tokens]
