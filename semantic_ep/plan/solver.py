"""The semantic solver: experts and the tokens that want them, clustered together.

Two steps alternate, each exact for its half. Given which rows (token ids, requests) belong to which
rank, experts are placed by a linear assignment with exact counts a rank. Given where experts are,
rows choose ranks under prices that keep the ranks' shares of tokens equal. Whole requests
(attention-DP) share one clustering over all layers; token schedules (attention-TP) cluster every
layer by itself.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Literal

import numpy as np
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.policies import register
from semantic_ep.topology import Topology

Mode = Literal["requests", "tokens"]

# Below this, clusters of sequences are noise.
MIN_SEQUENCES_PER_RANK = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class SemanticPolicy:
    """Joint co-clustering of tokens and experts.

    Attributes:
        mode: What gets a home rank: whole "requests" (one rank for all layers) or "tokens" (one a
            layer).
        starts: Independent starts; the best by cost wins.
    """

    mode: Mode = "tokens"
    starts: int = 8

    @property
    def name(self) -> str:
        """Name on the command line."""
        return "semantic" if self.mode == "tokens" else "semantic-requests"

    def place(
        self,
        profile: RoutingProfile,
        *,
        ep_size: int,
        seed: int = 0,
        time_limit: float | None = None,
        topology: Topology | None = None,
    ) -> Placement:
        """See `PlacementPolicy.place`."""
        Placement.contiguous(
            num_layers=1, num_experts=profile.fingerprint.num_experts, ep_size=ep_size
        )
        deadline = None if time_limit is None else time.monotonic() + time_limit
        tables, weight = _rows(profile, self.mode, ep_size)
        groups = [tables] if self.mode == "requests" else [[table] for table in tables]
        ranks = [
            cocluster(group, weight, ep_size, seed=seed, starts=self.starts, deadline=deadline)
            for group in groups
        ]
        return Placement.from_rank_of_expert(np.concatenate(ranks), ep_size=ep_size)


def _rows(
    profile: RoutingProfile, mode: Mode, ep_size: int
) -> tuple[list[sparse.csr_array], np.ndarray]:
    """What is clustered: L arrays [N, E] of activations, and [N] tokens in each row.

    Whole requests go to one rank, so what counts is which experts a sequence uses, not a token.
    Token ids stand in for sequences where the profile has sampled too few of them.
    """
    sequences = profile.sequence_load
    if mode == "requests" and len(sequences) >= MIN_SEQUENCES_PER_RANK * ep_size:
        tables = [sparse.csr_array(sequences[:, layer]) for layer in range(sequences.shape[1])]
        return tables, sequences[:, 0].sum(axis=1) / profile.fingerprint.top_k
    seen = np.flatnonzero(profile.token_count > 0)
    tables = [sparse.csr_array(table[seen]) for table in profile.token_expert]
    return tables, profile.token_count[seen]


def cocluster(
    tables: list[sparse.csr_array],
    weight: np.ndarray,
    ep_size: int,
    *,
    seed: int,
    starts: int,
    deadline: float | None = None,
    iterations: int = 30,
) -> np.ndarray:
    """Cluster rows and the experts of all tables together.

    Args:
        tables: L arrays [N, E], activations of each expert by each row.
        weight: [N] tokens in each row.
        ep_size: Clusters (G).
        seed: Seed of the starts.
        starts: Number of starts.
        deadline: `time.monotonic()` after which the best so far is returned.
        iterations: Bound on alternations.

    Returns:
        [L, E] rank of each expert, E / G on each rank in each layer.
    """
    rng = np.random.default_rng(seed)
    stacked = sparse.csr_array(sparse.hstack(tables))
    best, best_value = None, -np.inf
    for _ in range(starts):
        rank_N = rng.integers(ep_size, size=len(weight))
        value = -np.inf
        for _ in range(iterations):
            member = sparse.csr_array(
                (np.ones(len(weight)), (rank_N, np.arange(len(weight)))),
                shape=(ep_size, len(weight)),
            )
            gain = (member @ stacked).toarray().reshape(ep_size, len(tables), -1)
            rank_LE = np.stack([place_experts(gain[:, layer]) for layer in range(len(tables))])
            onehot = np.eye(ep_size)[rank_LE.ravel()]
            scores = stacked @ onehot
            rank_N = choose_ranks(scores / weight[:, None], weight)
            reached = float(scores[np.arange(len(weight)), rank_N].sum())
            if reached <= value * (1 + 1e-4):
                break
            value = reached
            if deadline is not None and time.monotonic() > deadline:
                break
        if value > best_value:
            best, best_value = rank_LE, value
        if deadline is not None and time.monotonic() > deadline:
            break
    assert best is not None
    return best


def place_experts(gain_GE: np.ndarray) -> np.ndarray:
    """[E] rank of each expert maximising the total gain, with exactly E / G on each rank."""
    ranks, experts = gain_GE.shape
    slots = experts // ranks
    rows, columns = linear_sum_assignment(-np.repeat(gain_GE, slots, axis=0))
    rank_E = np.empty(experts, dtype=np.int64)
    rank_E[columns] = rows // slots
    return rank_E


def choose_ranks(scores: np.ndarray, weight: np.ndarray, *, sweeps: int = 6) -> np.ndarray:
    """[N] rank of each row of best score under prices that give ranks equal weight."""
    rows, ranks = scores.shape
    price = np.zeros(ranks)
    share = weight.sum() * (1 - 1 / ranks)
    for _ in range(sweeps):
        for rank in range(ranks):
            net = scores - price
            net[:, rank] = -np.inf
            margin = scores[:, rank] - net.max(axis=1)
            order = np.argsort(margin, kind="stable")
            cut = int(np.searchsorted(np.cumsum(weight[order]), share))
            price[rank] = margin[order[min(cut, rows - 1)]]
    return np.asarray((scores - price).argmax(axis=1))


register(SemanticPolicy(mode="tokens"))
register(SemanticPolicy(mode="requests"))
