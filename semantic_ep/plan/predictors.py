"""Predictors: which experts a token will activate in a layer, before its router says so.

Known at that moment are the token id and the experts that the token used in earlier layers. One
linear model a layer, fitted by ridge regression, maps

    [table, table * log(1 + n), log(1 + n), 1, experts of the previous layers as multi-hot vectors]

to expected activations. `table` is the token id's share of activations in the profile, shrunk
towards the layer's popularity, and n its occurrences: the products let the model trust a table
more the more often its token was seen. In training the table leaves out the occurrence at hand;
otherwise ids seen once would look perfectly predictable.

The linear model is cheap: for a given placement it is one score table a token id and one a previous
expert, a handful of gathers at run time. A small perceptron can correct it by what a sum cannot
express, such as trusting the table where history agrees with it; it learns from linear scores of
models that were fitted without the tokens at hand.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from scipy import sparse

from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.perceptron import Perceptron
from semantic_ep.plan.placement import Placement

# Occurrences' worth of popularity mixed into each table row; the ridge corrects the rest.
_PRIOR_OCCURRENCES = 1.0
_RIDGE = 10.0
_MAX_FIT_TOKENS = 32768
DEPTHS = (0, 2, 8)
# Parts of the profile's tokens; each gets scores from a model of the others.
_FOLDS = 4
# Previous layers that the perceptron sees expert by expert.
_CORRECTED_DEPTH = 2
# Worth of meeting any expert at home, which saves a copy, against that of one local activation.
# Anything from one to three saves copies on the traces we have, and costs no local activations.
_COPY_WORTH = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What is known of T tokens when they reach a layer.

    Attributes:
        layer: The layer.
        token_id: [T] int, -1 where unknown.
        history: [T, layer, K] int, experts used in all earlier layers.
        previous_id: [T] int, the token before in the same request, -1 where there is none or it is
            unknown; None where nobody kept it.
    """

    layer: int
    token_id: np.ndarray
    history: np.ndarray
    previous_id: np.ndarray | None = None


class Predictor(Protocol):
    """Scores ranks for tokens of unknown route."""

    @property
    def name(self) -> str:
        """Its name in tables."""
        ...

    def rank_scores(self, context: Context, placement: Placement) -> np.ndarray:
        """[T, G] worth of each rank as home of each token; only differences in a row matter."""
        ...


class TrainingScores(Protocol):
    """Says what to expect of the tokens that were learned from, honestly."""

    def training_scores(self, trace: RoutingTrace, layer: int, rows: np.ndarray) -> np.ndarray:
        """[T, E] float32, expected activations, leaving out what the tokens themselves taught.

        Args:
            trace: The trace that was learned from.
            layer: The layer.
            rows: [T] tokens of the trace.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TablePredictor:
    """The token table alone: needs nothing but a profile.

    Attributes:
        profile: Counts that the table is made from.
    """

    profile: RoutingProfile

    @property
    def name(self) -> str:
        """Name in tables."""
        return "token table"

    def expert_scores(self, context: Context) -> np.ndarray:
        """[T, E] float32, expected activations."""
        table, _ = table_rows(self.profile, context.layer, context.token_id)
        return table

    def rank_scores(self, context: Context, placement: Placement) -> np.ndarray:
        """See `Predictor.rank_scores`."""
        return on_ranks(self.expert_scores(context), placement, context.layer)

    def training_scores(self, trace: RoutingTrace, layer: int, rows: np.ndarray) -> np.ndarray:
        """See `TrainingScores.training_scores`."""
        return left_out_rows(self.profile, trace, layer, rows)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RidgePredictor:
    """Token table and previous layers' experts, weighted by ridge regression.

    Attributes:
        profile: Counts that the table is made from.
        token_weight: [L, 2 * E + 2, E] float32.
        history_weight: [L, depth, E, E] float32; [l, d] weighs the experts of layer l - 1 - d.
        correction: What is added to the linear scores of each fitted layer; empty for nothing.
    """

    profile: RoutingProfile
    token_weight: np.ndarray
    history_weight: np.ndarray
    correction: Mapping[int, Perceptron] = dataclasses.field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Previous layers looked at."""
        return int(self.history_weight.shape[1])

    @property
    def name(self) -> str:
        """Name in tables."""
        ridge = f"ridge over token table and {self.depth} previous layers"
        return f"{ridge}, corrected by a perceptron" if self.correction else ridge

    def expert_scores(self, context: Context) -> np.ndarray:
        """[T, E] float32, expected activations."""
        layer = context.layer
        table, count = table_rows(self.profile, layer, context.token_id)
        scores = self._linear(context, table, count)
        if layer in self.correction:
            used = _history(context.history, layer, min(self.depth, layer), scores.shape[1])
            scores = scores + self.correction[layer](_correction_inputs(scores, table, count, used))
        return scores

    def rank_scores(self, context: Context, placement: Placement) -> np.ndarray:
        """See `Predictor.rank_scores`."""
        return on_ranks(self.expert_scores(context), placement, context.layer)

    def training_scores(self, trace: RoutingTrace, layer: int, rows: np.ndarray) -> np.ndarray:
        """See `TrainingScores.training_scores`: linear, as the correction knows these tokens."""
        context = context_of(trace, layer, rows)
        table, count = left_out_rows(self.profile, trace, layer, rows)
        return self._linear(context, table, count)

    def _linear(self, context: Context, table: np.ndarray, count: np.ndarray) -> np.ndarray:
        layer = context.layer
        scores = _token_features(table, count) @ self.token_weight[layer]
        depth = min(self.depth, layer)
        if depth:
            used = _history(context.history, layer, depth, scores.shape[1])
            scores = scores + used @ self.history_weight[layer, :depth].reshape(-1, scores.shape[1])
        return np.asarray(scores)

    @classmethod
    def fit(
        cls,
        trace: RoutingTrace,
        profile: RoutingProfile,
        *,
        depth: int,
        layers: Sequence[int] | None = None,
        corrected: bool = False,
    ) -> RidgePredictor:
        """Fit on a trace and the profile counted from it.

        Args:
            trace: Tokens to learn from; at most 32,768 are used, spread evenly.
            profile: `RoutingProfile.from_trace` of the same trace.
            depth: Previous layers to look at.
            layers: Layers to fit, all by default; the weights of others stay zero.
            corrected: Whether to fit a perceptron too, in about ten times the time.
        """
        all_layers, experts = profile.fingerprint.num_layers, profile.fingerprint.num_experts
        rows = np.unique(
            np.linspace(0, trace.num_tokens - 1, min(trace.num_tokens, _MAX_FIT_TOKENS)).astype(int)
        )
        fixed = 2 * experts + 2
        token_weight = np.zeros((all_layers, fixed, experts), dtype=np.float32)
        history_weight = np.zeros((all_layers, depth, experts, experts), dtype=np.float32)
        correction = {}
        for layer in range(all_layers) if layers is None else layers:
            table, count = left_out_rows(profile, trace, layer, rows)
            back = min(depth, layer)
            used = _history(trace.experts[rows, :layer], layer, back, experts)
            target = multihot(trace.experts[rows, layer], experts)
            weight, left_out = _ridge(_token_features(table, count), used, target)
            token_weight[layer] = weight[:fixed]
            history_weight[layer, :back] = weight[fixed:].reshape(back, experts, experts)
            if corrected:
                inputs = _correction_inputs(left_out, table, count, used)
                correction[layer] = Perceptron.fit(inputs, target - left_out, seed=layer)
        return cls(
            profile=profile,
            token_weight=token_weight,
            history_weight=history_weight,
            correction=correction,
        )


def context_of(trace: RoutingTrace, layer: int, rows: np.ndarray | slice = slice(None)) -> Context:
    """Return what is known of a trace's tokens when they reach a layer."""
    return Context(
        layer=layer,
        token_id=trace.token_id[rows],
        history=trace.experts[rows, :layer],
        previous_id=previous_ids(trace)[rows],
    )


def previous_ids(trace: RoutingTrace) -> np.ndarray:
    """[N] int32, id of the token before each token in its request; -1 for the first."""
    previous = np.concatenate([[-1], trace.token_id[:-1]]).astype(np.int32)
    starts = trace.offsets[:-1]
    previous[starts[starts < trace.num_tokens]] = -1
    return previous[: trace.num_tokens]


def multihot(expert_TK: np.ndarray, num_experts: int) -> np.ndarray:
    """[T, E] float32, 1 where a token activates an expert."""
    hot = np.zeros((len(expert_TK), num_experts), dtype=np.float32)
    hot[np.arange(len(expert_TK))[:, None], expert_TK] = 1
    return hot


def on_ranks(scores_TE: np.ndarray, placement: Placement, layer: int) -> np.ndarray:
    """[T, G] expected activations on each rank, and the chance of any: the first saves a copy."""
    held_EG = placement.expert_on_rank[layer].astype(np.float32)
    absent_TE = np.log1p(-np.clip(scores_TE, 0, 0.999))
    return np.asarray(scores_TE @ held_EG - _COPY_WORTH * np.exp(absent_TE @ held_EG))


def _history(experts_TlK: np.ndarray, layer: int, depth: int, num_experts: int) -> sparse.csr_array:
    """[T, depth * E] multi-hot vectors of the last `depth` layers, the nearest first."""
    tokens, _, top_k = experts_TlK.shape
    recent = experts_TlK[:, layer - depth : layer][:, ::-1].astype(np.int64)
    columns = recent + np.arange(depth)[None, :, None] * num_experts
    return sparse.csr_array(
        (
            np.ones(columns.size, dtype=np.float32),
            columns.ravel(),
            np.arange(tokens + 1) * depth * top_k,
        ),
        shape=(tokens, depth * num_experts),
    )


def _ridge(
    dense: np.ndarray, hot: sparse.csr_array, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """[F + H, E] weights of `target` on [dense, hot], and [T, E] scores by fits without the token.

    Each fold of adjacent tokens is scored by a fit on the others; products of folds add up.
    """
    edges = np.linspace(0, len(dense), _FOLDS + 1).astype(int)
    folds = [slice(start, end) for start, end in itertools.pairwise(edges)]
    products = [_products(dense[fold], hot[fold], target[fold]) for fold in folds]
    normal, right = (np.sum(part, axis=0) for part in zip(*products, strict=True))
    normal[np.diag_indices(len(normal))] += _RIDGE
    left_out = []
    for fold, (own_normal, own_right) in zip(folds, products, strict=True):
        weight = np.linalg.solve(normal - own_normal, right - own_right).astype(np.float32)
        left_out.append(
            dense[fold] @ weight[: dense.shape[1]] + hot[fold] @ weight[dense.shape[1] :]
        )
    return np.linalg.solve(normal, right).astype(np.float32), np.concatenate(left_out)


def _products(
    dense: np.ndarray, hot: sparse.csr_array, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """[F + H, F + H] and [F + H, E], both sides of the normal equations; hot's share is sparse."""
    cross = hot.T @ dense
    normal = np.block([[dense.T @ dense, cross.T], [cross, (hot.T @ hot).toarray()]])
    return normal.astype(np.float64), np.vstack([dense.T @ target, hot.T @ target])


def _correction_inputs(
    scores: np.ndarray, table: np.ndarray, count: np.ndarray, used: sparse.csr_array
) -> np.ndarray:
    """[T, F] float32, what a perceptron looks at."""
    recent = used[:, : _CORRECTED_DEPTH * scores.shape[1]].toarray()
    return np.hstack([scores, table, np.log1p(count)[:, None], recent]).astype(np.float32)


def _token_features(table: np.ndarray, count: np.ndarray) -> np.ndarray:
    """[T, 2 * E + 2] float32."""
    trust = np.log1p(count)[:, None]
    return np.hstack([table, table * trust, trust, np.ones_like(trust)]).astype(np.float32)


def table_rows(
    profile: RoutingProfile, layer: int, token_id: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """[T, E] expected activations by token id, and [T] occurrences of the id in the profile."""
    known = (token_id >= 0) & (token_id < profile.vocab_size)
    ids = np.where(known, token_id, 0)
    counts = profile.token_expert[layer]
    rows = sparse.csr_array(counts[ids]).toarray() * known[:, None]
    return _shrunk(profile, layer, rows)


def left_out_rows(
    profile: RoutingProfile, trace: RoutingTrace, layer: int, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`table_rows`, as if each occurrence had not been counted."""
    token_id = trace.token_id[rows]
    experts = profile.fingerprint.num_experts
    ids = np.where(token_id >= 0, token_id, 0)
    counts = sparse.csr_array(profile.token_expert[layer][ids]).toarray()
    own = multihot(trace.experts[rows, layer], experts)
    counts = np.maximum(counts - own, 0) * (token_id >= 0)[:, None]
    return _shrunk(profile, layer, counts)


def _shrunk(
    profile: RoutingProfile, layer: int, counts_TE: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    load = profile.load[layer]
    top_k = profile.fingerprint.top_k
    prior = (load * top_k / max(float(load.sum()), 1e-12)).astype(np.float32)
    occurrences = counts_TE.sum(axis=1) / top_k
    weight = (occurrences + _PRIOR_OCCURRENCES)[:, None]
    table = (counts_TE + _PRIOR_OCCURRENCES * prior) / weight
    return table.astype(np.float32), occurrences.astype(np.float32)
