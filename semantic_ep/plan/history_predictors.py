"""Predictors that count what came before: the previous token, or the devices of earlier layers.

Both are lookups at run time. `semantic_ep.plan.predictors` has the token table, which both fall
back to, and the regression, which weighs what these count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.predictors import (
    Context,
    TablePredictor,
    left_out_rows,
    multihot,
    on_ranks,
    previous_ids,
    table_rows,
)

# Layers that the n-gram of devices looks back.
LOOK_BACK = 2
# Occurrences' worth of the token's own row mixed into the row of a pair. Anything from two to four
# gives the same held-out error to within a half per cent on the traces we have.
_PRIOR_PAIRS = 3.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairPredictor:
    """Rows by previous token and token, shrunk towards the token's own; needs no routes.

    Attributes:
        table: Rows by token, also for pairs that were never seen.
        pairs: [P] int64, sorted, previous id * V + id of each pair that was seen.
        counts: L arrays [P, E], activations after each pair; empty where not fitted.
    """

    table: TablePredictor
    pairs: np.ndarray
    counts: tuple[sparse.csr_array, ...]

    @property
    def name(self) -> str:
        """Name in tables."""
        return "previous token and token"

    def expert_scores(self, context: Context) -> np.ndarray:
        """[T, E] float32, expected activations."""
        rows, _ = table_rows(self.table.profile, context.layer, context.token_id)
        if context.previous_id is None:
            return rows
        keys = _keys(context.previous_id, context.token_id, self.table.profile.vocab_size)
        return self._shrunk(rows, self._counted(keys, context.layer))

    def rank_scores(self, context: Context, placement: Placement) -> np.ndarray:
        """See `Predictor.rank_scores`."""
        return on_ranks(self.expert_scores(context), placement, context.layer)

    def training_scores(self, trace: RoutingTrace, layer: int, rows: np.ndarray) -> np.ndarray:
        """See `TrainingScores.training_scores`."""
        profile = self.table.profile
        by_token, _ = left_out_rows(profile, trace, layer, rows)
        keys = _keys(previous_ids(trace)[rows], trace.token_id[rows], profile.vocab_size)
        own = multihot(trace.experts[rows, layer], by_token.shape[1])
        return self._shrunk(by_token, np.maximum(self._counted(keys, layer) - own, 0))

    def _counted(self, keys: np.ndarray, layer: int) -> np.ndarray:
        if len(self.pairs) == 0:
            return np.zeros((len(keys), self.counts[layer].shape[1]), dtype=np.float32)
        place = np.minimum(np.searchsorted(self.pairs, keys), len(self.pairs) - 1)
        known = self.pairs[place] == keys
        rows: np.ndarray = sparse.csr_array(self.counts[layer][place]).toarray()
        return np.asarray(rows * known[:, None])

    def _shrunk(self, by_token: np.ndarray, counted: np.ndarray) -> np.ndarray:
        occurrences = counted.sum(axis=1, keepdims=True) / self.table.profile.fingerprint.top_k
        mixed = (counted + _PRIOR_PAIRS * by_token) / (occurrences + _PRIOR_PAIRS)
        return np.asarray(mixed, dtype=np.float32)

    @classmethod
    def fit(
        cls, trace: RoutingTrace, profile: RoutingProfile, *, layers: Sequence[int] | None = None
    ) -> PairPredictor:
        """Count the pairs of a trace.

        Args:
            trace: Tokens to learn from.
            profile: `RoutingProfile.from_trace` of the same trace.
            layers: Layers to count, all by default; others have the token's rows alone.
        """
        keys = _keys(previous_ids(trace), trace.token_id, profile.vocab_size)
        seen = np.flatnonzero(keys >= 0)
        pairs, pair_of = np.unique(keys[seen], return_inverse=True)
        experts, top_k = profile.fingerprint.num_experts, profile.fingerprint.top_k
        shape = (len(pairs), experts)
        counts = [sparse.csr_array(shape, dtype=np.float32)] * profile.fingerprint.num_layers
        for layer in range(len(counts)) if layers is None else layers:
            used = trace.experts[seen, layer].astype(np.int64)
            ones = np.ones(used.size, dtype=np.float32)
            places = (np.repeat(pair_of, top_k), used.ravel())
            counts[layer] = sparse.csr_array(sparse.coo_array((ones, places), shape=shape))
        return cls(table=TablePredictor(profile=profile), pairs=pairs, counts=tuple(counts))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NGramPredictor:
    """The published rule: token table, or the devices of the last layers where they are surer.

    arXiv 2503.04398: `dev = where(Tp > Ap, T[token], A[device history])`, two layers back. Here
    a token's device in a layer is the rank with most of its experts. It is counted for a placement
    in force, so no placement can be planned with it.

    Attributes:
        table: Of the profile.
        share: [L, G, ..., G, G] expected share of activations on each rank after a history.
    """

    table: TablePredictor
    share: np.ndarray

    @property
    def name(self) -> str:
        """Name in tables."""
        return "n-gram of devices and token table"

    def rank_scores(self, context: Context, placement: Placement) -> np.ndarray:
        """[T, G] share of activations on each rank, by the surer of the two."""
        held_EG = placement.expert_on_rank[context.layer].astype(np.float32)
        by_token = self.table.expert_scores(context) @ held_EG
        by_token = by_token / np.maximum(by_token.sum(axis=1, keepdims=True), 1e-9)
        if context.layer < LOOK_BACK:
            return np.asarray(by_token)
        history = devices(context.history, placement)[:, context.layer - LOOK_BACK :]
        by_history = self.share[context.layer][tuple(history.T)]
        surer = by_token.max(axis=1) > by_history.max(axis=1)
        return np.asarray(np.where(surer[:, None], by_token, by_history))

    @classmethod
    def fit(
        cls, trace: RoutingTrace, table: TablePredictor, placement: Placement
    ) -> NGramPredictor:
        """Count the histories of a trace."""
        layers, ranks = placement.num_layers, placement.ep_size
        device_NL = devices(trace.experts, placement)
        share = np.zeros((layers, *[ranks] * (LOOK_BACK + 1)))
        for layer in range(LOOK_BACK, layers):
            hits_NG = placement.expert_on_rank[layer][trace.experts[:, layer]].sum(axis=1)
            history = tuple(device_NL[:, layer - LOOK_BACK : layer].T)
            # A history seen rarely is taken for one that says nothing.
            share[layer] = hits_NG.mean(axis=0)
            np.add.at(share[layer], history, hits_NG)
        return cls(table=table, share=share / np.maximum(share.sum(axis=-1, keepdims=True), 1e-9))


def devices(experts_NlK: np.ndarray, placement: Placement) -> np.ndarray:
    """[N, l] rank with most of a token's experts, in the first l layers."""
    layers = range(experts_NlK.shape[1])
    hits = [placement.expert_on_rank[layer][experts_NlK[:, layer]].sum(axis=1) for layer in layers]
    return np.asarray(np.stack(hits, axis=1).argmax(axis=2))


def _keys(previous_id: np.ndarray, token_id: np.ndarray, vocab_size: int) -> np.ndarray:
    """[T] int64 of each pair; -1 where either is unknown or out of the vocabulary."""
    previous, own = previous_id.astype(np.int64), token_id.astype(np.int64)
    known = (previous >= 0) & (previous < vocab_size) & (own >= 0) & (own < vocab_size)
    return np.where(known, previous * vocab_size + own, -1)
