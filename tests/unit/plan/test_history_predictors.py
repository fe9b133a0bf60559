from __future__ import annotations

import dataclasses

import numpy as np

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.history_predictors import LOOK_BACK, NGramPredictor, PairPredictor
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.predictors import TablePredictor, context_of, multihot, previous_ids
from tests.unit.plan.synthetic import planted_trace


def _pairs_decide(seed: int) -> RoutingTrace:
    """Layer 0 uses experts that only the previous and the own token id tell together."""
    trace = planted_trace(seed=seed, requests=60)
    ids = (trace.token_id % 6).astype(np.int32)
    trace = dataclasses.replace(trace, token_id=ids)
    mixed = (previous_ids(trace) + ids) % 6
    experts = trace.experts.copy()
    experts[:, 0] = np.stack([mixed, 8 + mixed], axis=1)
    return dataclasses.replace(trace, experts=experts)


def test_pairs_predict_where_single_ids_cannot():
    trace, held_out = _pairs_decide(1), _pairs_decide(2)
    profile = RoutingProfile.from_trace(trace, vocab_size=6)
    context, truth = context_of(held_out, 0), multihot(held_out.experts[:, 0], 16)
    alone = TablePredictor(profile=profile)
    pairs = PairPredictor.fit(trace, profile)
    error, error_alone = (
        float(((one.expert_scores(context) - truth) ** 2).mean()) for one in (pairs, alone)
    )
    assert error < 0.3 * error_alone
    # A caller that keeps no previous ids gets the token's own rows.
    blind = dataclasses.replace(context, previous_id=None)
    np.testing.assert_allclose(pairs.expert_scores(blind), alone.expert_scores(blind))


def test_a_pair_seen_once_teaches_nothing_about_its_own_occurrence():
    trace = planted_trace(seed=4, requests=20)
    ids = trace.token_id.copy()
    ids[:2] = 62, 63
    ids[2:] %= 62
    trace = dataclasses.replace(trace, token_id=ids)
    profile = RoutingProfile.from_trace(trace, vocab_size=64)
    pairs = PairPredictor.fit(trace, profile)
    row = np.array([1])
    own = pairs.table.training_scores(trace, 0, row)
    np.testing.assert_allclose(pairs.training_scores(trace, 0, row), own, atol=1e-6)
    assert not np.allclose(pairs.expert_scores(context_of(trace, 0, row)), own)


def test_requests_begin_without_a_previous_token():
    trace = planted_trace(seed=5, requests=4)
    previous = previous_ids(trace)
    assert (previous[trace.offsets[:-1]] == -1).all()
    later = np.setdiff1d(np.arange(trace.num_tokens), trace.offsets[:-1])
    np.testing.assert_array_equal(previous[later], trace.token_id[later - 1])


def test_the_n_gram_follows_devices_where_token_ids_say_nothing():
    draw = np.random.default_rng(1)
    # The rank of layer 2 is that of layer 1; token ids are noise.
    tokens, side = 400, draw.integers(0, 2, 400)
    experts = np.stack([draw.integers(0, 4, tokens), side * 2, side * 2 + 1], axis=1)[..., None]
    trace = RoutingTrace(
        fingerprint=ModelFingerprint(
            architecture="x",
            layer_ids=(0, 1, 2),
            num_experts=4,
            top_k=1,
            router_sha256="",
            tokenizer_sha256="",
        ),
        experts=experts.astype(np.uint8),
        offsets=np.array([0, tokens]),
        token_id=draw.integers(0, 3, tokens).astype(np.int32),
    )
    placement = Placement.contiguous(num_layers=3, num_experts=4, ep_size=2)
    table = TablePredictor(profile=RoutingProfile.from_trace(trace, vocab_size=3))
    predictor = NGramPredictor.fit(trace, table, placement)
    scores = predictor.rank_scores(context_of(trace, LOOK_BACK), placement)
    assert (scores.argmax(axis=1) == side).all()
