"""Which ranks the tokens of a prompt will be sent to, from a table of token ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import numpy as np

from semantic_ep.plan.schedule import Schedule

# Long prompts are judged by this many of their tokens, evenly spaced: it bounds the time of a
# decision, and the mean moves by about a fiftieth, which is less than a table of ids knows.
SAMPLED_TOKENS = 128
_ONES = np.ones(SAMPLED_TOKENS, dtype=np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RankHits:
    """Probability that a token activates at least one expert on a rank, mean over layers.

    Attributes:
        table_VG: [V, G] uint8, in units of 1/255.
        top_k: Experts that a token activates (K).
    """

    table_VG: np.ndarray
    top_k: int

    @classmethod
    def from_schedule(cls, schedule: Schedule, *, top_k: int) -> Self:
        """Derive hits from the shares of activations, as if K experts were drawn independently."""
        share = np.clip(schedule.request_affinity.astype(np.float32), 0.0, 1.0)
        table_VG = np.round(255 * (1 - (1 - share) ** top_k)).astype(np.uint8)
        return cls(table_VG=table_VG, top_k=top_k)

    @property
    def ep_size(self) -> int:
        """Number of EP ranks (G)."""
        return int(self.table_VG.shape[1])

    def of_prompt(self, token_ids: Sequence[int]) -> np.ndarray:
        """[G] float32, mean hits of a prompt's tokens on each rank; zeros if no id is known.

        Ids outside the table (added tokens, -1) tell nothing and are skipped.
        """
        step = -(-len(token_ids) // SAMPLED_TOKENS) or 1
        sampled = token_ids[::step]
        ids = np.fromiter(sampled, np.int64, len(sampled))
        # Negative ids are the largest of all when read without a sign.
        unsigned = ids.view(np.uint64)
        if len(ids) and unsigned.max() >= len(self.table_VG):
            ids = ids[unsigned < len(self.table_VG)]
        if not len(ids):
            return np.zeros(self.ep_size, dtype=np.float32)
        # Told to clip, which is nothing to do here, numpy looks up without a buffer.
        rows = self.table_VG.take(ids, axis=0, mode="clip").astype(np.float32)
        # A product with ones is several times as fast as a sum over the first axis.
        hits: np.ndarray = np.dot(_ONES[: len(ids)], rows)
        hits *= 1 / (255 * len(ids))
        return hits
