"""What the solver looks at in one layer: sampled tokens and their expected activations."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import sparse

from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.predictors import TrainingScores, multihot
from semantic_ep.plan.search import saving_by_pairs
from semantic_ep.plan.slices import BATCH_TOKENS

_TOKENS = 4096
_MAX_BATCHES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """A raw trace beside the profile counted from it, and a predictor fitted on it.

    With it the solver sees whole batches, true co-activation and earlier layers' experts; without
    it, only token ids and pair counts.
    """

    trace: RoutingTrace
    predictor: TrainingScores


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSample:
    """N sampled tokens of one layer; the arguments of `SwapSearch`.

    Attributes:
        expected_NE: Expected activations.
        active_NE: Whether a token does activate an expert (how many of several merged), or None.
        pairs_EE: See `saving_by_pairs`.
        load_E: Activations of each expert in the profile.
        top_k: Experts a token activates (K).
        batches: Batches of equal size that the N tokens come from, adjacent.
    """

    expected_NE: np.ndarray
    active_NE: np.ndarray | None
    pairs_EE: np.ndarray
    load_E: np.ndarray
    top_k: int
    batches: int

    def merged(self, groups: int) -> LayerSample:
        """Return the sample with each group of neighbouring experts as one: they move together."""

        def summed(array: np.ndarray) -> np.ndarray:
            return np.asarray(array.reshape(*array.shape[:-1], groups, -1).sum(axis=-1))

        pairs = summed(summed(self.pairs_EE).T)
        np.fill_diagonal(pairs, 0.0)
        return dataclasses.replace(
            self,
            expected_NE=summed(self.expected_NE),
            active_NE=None if self.active_NE is None else summed(self.active_NE),
            pairs_EE=pairs,
            load_E=summed(self.load_E),
        )

    def part(self, tokens: np.ndarray, experts: np.ndarray) -> LayerSample:
        """Return the sample of some tokens and experts: one node's problem."""
        active = None if self.active_NE is None else self.active_NE[np.ix_(tokens, experts)]
        return LayerSample(
            expected_NE=self.expected_NE[np.ix_(tokens, experts)],
            active_NE=active,
            pairs_EE=self.pairs_EE[np.ix_(experts, experts)],
            load_E=self.load_E[experts],
            top_k=self.top_k,
            batches=1,
        )


def sample_layer(
    profile: RoutingProfile,
    evidence: Evidence | None,
    layer: int,
    *,
    ep_size: int,
    seed: int,
    tokens: int = _TOKENS,
) -> LayerSample:
    """Draw a layer's sample: whole batches thinned evenly, or token ids by frequency."""
    rng = np.random.default_rng((seed, layer))
    fingerprint = profile.fingerprint
    top_k = fingerprint.top_k
    pairs = saving_by_pairs(
        profile.coactivation[layer], tokens=profile.tokens, top_k=top_k, ep_size=ep_size
    )
    if evidence is None or evidence.trace.num_tokens < 2 * BATCH_TOKENS:
        frequency = np.asarray(profile.token_expert[layer].sum(axis=1)).ravel()
        if not frequency.any():
            return _blind_sample(profile, layer, pairs)
        ids = rng.choice(len(frequency), size=tokens, p=frequency / frequency.sum())
        counts = sparse.csr_array(profile.token_expert[layer][ids]).toarray()
        prior = profile.load[layer] * top_k / profile.load[layer].sum()
        expected = top_k * (counts + prior) / (counts.sum(axis=1) + top_k)[:, None]
        active, batches = None, 1
    else:
        rows, batches = _thinned_batches(evidence.trace.num_tokens, rng, tokens=tokens)
        expected = evidence.predictor.training_scores(evidence.trace, layer, rows)
        active = multihot(evidence.trace.experts[rows, layer], fingerprint.num_experts) > 0
    return LayerSample(
        expected_NE=np.asarray(expected, dtype=np.float32),
        active_NE=active,
        pairs_EE=pairs,
        load_E=profile.load[layer],
        top_k=top_k,
        batches=batches,
    )


def _blind_sample(profile: RoutingProfile, layer: int, pairs: np.ndarray) -> LayerSample:
    """No token ids: every token looks alike, and only pairs and load can be planned for."""
    load = profile.load[layer]
    expected = np.tile(load * profile.fingerprint.top_k / max(float(load.sum()), 1e-12), (64, 1))
    return LayerSample(
        expected_NE=expected.astype(np.float32),
        active_NE=None,
        pairs_EE=pairs,
        load_E=load,
        top_k=profile.fingerprint.top_k,
        batches=1,
    )


def _thinned_batches(
    available: int, rng: np.random.Generator, *, tokens: int
) -> tuple[np.ndarray, int]:
    """Rows of evenly spread whole batches, and how many batches."""
    whole = available // BATCH_TOKENS
    chosen = np.unique(np.linspace(0, whole - 1, min(whole, _MAX_BATCHES)).astype(int))
    width = min(BATCH_TOKENS, max(-(-tokens // len(chosen)), 32))
    rows = [
        batch * BATCH_TOKENS + np.sort(rng.choice(BATCH_TOKENS, width, replace=False))
        for batch in chosen
    ]
    return np.concatenate(rows), len(chosen)
