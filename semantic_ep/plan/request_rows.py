"""What is clustered for whole requests: sequences, or token ids in their stead."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import sparse

from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan.coclustering import value_of

# With fewer sequences in a profile, clusters of them would be clusters of accidents.
MIN_SEQUENCES_PER_RANK = 8
# Rows of a co-clustering when token ids stand in for sequences.
_MAX_TOKEN_IDS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestRows:
    """N rows of the clustering.

    Attributes:
        tables: L arrays [N, E], activations.
        weight: [N] tokens in each row.
        pairs_LEE: See `cocluster`.
    """

    tables: list[sparse.csr_array]
    weight: np.ndarray
    pairs_LEE: np.ndarray

    def on_ranks(self, rank_LE: np.ndarray, ep_size: int) -> np.ndarray:
        """[N, G] activations of each row on each rank, over all layers."""
        parts = [table @ np.eye(ep_size)[rank_E] for table, rank_E in zip(self.tables, rank_LE)]
        return np.asarray(sum(parts))

    def value(self, rank_LE: np.ndarray, ep_size: int, *, load_cap: float) -> float:
        """What the clustering maximises, for experts as they are placed; see `value_of`."""
        return value_of(
            self.tables,
            self.weight,
            rank_LE,
            ep_size,
            pairs_LEE=self.pairs_LEE,
            load_cap=load_cap,
        )

    def merged(self, groups: int) -> RequestRows:
        """Return the rows with each group of neighbouring experts as one: they move together."""
        layers, experts = self.pairs_LEE.shape[:2]
        group_E = np.arange(experts) * groups // experts
        onto = sparse.csr_array(np.eye(groups)[group_E])
        size = experts // groups
        pairs = self.pairs_LEE.reshape(layers, groups, size, groups, size).sum(axis=(2, 4))
        return RequestRows(
            tables=[sparse.csr_array(table @ onto) for table in self.tables],
            weight=self.weight,
            pairs_LEE=pairs * (1 - np.eye(groups)),
        )

    def part(self, rows: np.ndarray, expert_LE: np.ndarray) -> RequestRows:
        """Return some rows, and some experts of each layer: one node's problem."""
        return RequestRows(
            tables=[
                sparse.csr_array(table[rows][:, experts])
                for table, experts in zip(self.tables, expert_LE)
            ],
            weight=self.weight[rows],
            pairs_LEE=np.stack(
                [pairs[np.ix_(own, own)] for pairs, own in zip(self.pairs_LEE, expert_LE)]
            ),
        )


def request_rows(
    profile: RoutingProfile, ep_size: int, rng: np.random.Generator
) -> tuple[list[sparse.csr_array], np.ndarray]:
    """What is clustered: L arrays [N, E] of activations, and [N] tokens in each row.

    Whole requests go to one rank, so what counts is which experts a sequence uses, not a token.
    Token ids stand in for sequences where the profile has sampled too few of them; of many ids,
    some are drawn by frequency.
    """
    sequences = profile.sequence_load
    if len(sequences) >= MIN_SEQUENCES_PER_RANK * ep_size:
        sequences = sequences[sequences[:, 0].sum(axis=1) > 0]
        tables = [sparse.csr_array(sequences[:, layer]) for layer in range(sequences.shape[1])]
        return tables, sequences[:, 0].sum(axis=1) / profile.fingerprint.top_k
    count = profile.token_count
    seen = np.flatnonzero(count > 0)
    if len(seen) <= _MAX_TOKEN_IDS:
        return [sparse.csr_array(table[seen]) for table in profile.token_expert], count[seen]
    drawn = rng.choice(seen, size=_MAX_TOKEN_IDS, p=count[seen] / count[seen].sum())
    ids, weight = np.unique(drawn, return_counts=True)
    tables = [
        sparse.csr_array(sparse.diags_array(weight / count[ids]) @ table[ids])
        for table in profile.token_expert
    ]
    return tables, weight.astype(np.float64)
