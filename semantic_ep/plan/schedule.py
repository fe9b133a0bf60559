"""Schedule: on which rank a token, or a whole request, meets most of its experts.

A schedule is what the serving engine looks up: token -> rank for each MoE layer (attention-TP),
and token -> affinity to each rank over all layers (attention-DP), both compact enough to copy to
every rank.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import numpy as np

from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan.placement import Placement


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Lookup tables of token ids seen in the profile.

    Attributes:
        token_to_rank: [L, V] int8 (int16 above 127 ranks), rank with most of the token's expected
            activations; -1 for an id never seen.
        confidence: [L, V] uint8, expected share of the token's activations on that rank, in
            units of 1/255; 0 for an id never seen.
        request_affinity: [V, G] float16, expected share of a token's activations on each rank,
            mean over layers; an id never seen has the mean of all tokens.
    """

    token_to_rank: np.ndarray
    confidence: np.ndarray
    request_affinity: np.ndarray

    @property
    def num_layers(self) -> int:
        """Number of MoE layers (L)."""
        return len(self.token_to_rank)

    @property
    def ep_size(self) -> int:
        """Number of EP ranks (G)."""
        return int(self.request_affinity.shape[1])

    @property
    def vocab_size(self) -> int:
        """Number of token ids (V)."""
        return len(self.request_affinity)

    @property
    def nbytes(self) -> int:
        """Memory of the tables, in bytes, on each rank."""
        return sum(table.nbytes for table in self.arrays().values())

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the tables by name, as the plan artefact stores them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def request_score(self, token_ids: np.ndarray) -> np.ndarray:
        """[G] float64, expected activations (in tokens' worth) that a request finds on each rank.

        Ids outside the tables (added tokens, -1) tell nothing and are skipped.
        """
        ids = np.asarray(token_ids, dtype=np.int64)
        ids = ids[(ids >= 0) & (ids < self.vocab_size)]
        score: np.ndarray = self.request_affinity[ids].sum(axis=0, dtype=np.float64)
        return score

    @classmethod
    def from_profile(cls, profile: RoutingProfile, placement: Placement) -> Self:
        """Build the tables for a placement from token -> expert counts.

        Counts are shrunk towards the layer's popularity, so that an id seen once does not claim
        certainty.
        """
        ranks, vocab = placement.ep_size, profile.vocab_size
        kind = np.int8 if ranks <= 127 else np.int16
        token_to_rank = np.full((placement.num_layers, vocab), -1, dtype=kind)
        confidence = np.zeros((placement.num_layers, vocab), dtype=np.uint8)
        affinity = np.zeros((vocab, ranks))
        seen = np.flatnonzero(profile.token_count > 0)
        for layer in range(placement.num_layers):
            share, prior = rank_shares(profile, placement, layer)
            token_to_rank[layer, seen] = share[seen].argmax(axis=1)
            confidence[layer, seen] = np.round(share[seen].max(axis=1) * 255)
            affinity += share - prior
        return cls(
            token_to_rank=token_to_rank,
            confidence=confidence,
            request_affinity=(affinity / placement.num_layers + 1 / ranks).astype(np.float16),
        )


# Weight, in occurrences, of the layer's popularity against a token's own counts. Anything from
# half to two occurrences gives the same held-out cost to within noise on the traces we have.
PRIOR_OCCURRENCES = 1.0


def rank_shares(
    profile: RoutingProfile, placement: Placement, layer: int
) -> tuple[np.ndarray, np.ndarray]:
    """Expected share of each token id's activations on each rank, and that of a blind token.

    Returns:
        [V, G] and [G] float64. With replicas an expert counts on every rank that holds a copy.
    """
    held_EG = placement.expert_on_rank[layer].astype(np.float64)
    load_E = profile.load[layer]
    prior_G = (load_E @ held_EG) / max(float(load_E.sum()), 1e-12)
    counts_VG = np.asarray(profile.token_expert[layer] @ held_EG)
    total_V = np.asarray(profile.token_expert[layer].sum(axis=1)).ravel()
    weight = PRIOR_OCCURRENCES * profile.fingerprint.top_k
    shares = (counts_VG + weight * prior_G) / (total_V + weight)[:, None]
    return shares, prior_G
