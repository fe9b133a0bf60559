from __future__ import annotations

import dataclasses

import numpy as np

from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.predictor_choice import choose_predictor
from semantic_ep.plan.predictors import RidgePredictor, TablePredictor, context_of, multihot
from tests.unit.plan.synthetic import planted_trace

CONTIGUOUS = Placement.contiguous(num_layers=2, num_experts=16, ep_size=4)


def _error(predictor, trace: RoutingTrace, layer: int) -> float:
    truth = multihot(trace.experts[:, layer], 16)
    return float(((predictor.expert_scores(context_of(trace, layer)) - truth) ** 2).mean())


def _history_decides(seed: int) -> RoutingTrace:
    """Token ids tell nothing; layer 1 uses a fixed image of layer 0's experts."""
    trace = planted_trace(seed=seed, requests=40)
    experts = trace.experts.copy()
    rng = np.random.default_rng(seed)
    experts[:, 0] = rng.random((trace.num_tokens, 16)).argsort(axis=1)[:, :2]
    experts[:, 1] = (experts[:, 0] * 5 + 3) % 16
    return dataclasses.replace(trace, experts=experts)


def test_history_predicts_where_token_ids_cannot():
    trace, held_out = _history_decides(1), _history_decides(2)
    profile = RoutingProfile.from_trace(trace, vocab_size=64)
    ridge = RidgePredictor.fit(trace, profile, depth=1)
    assert _error(ridge, held_out, 1) < 0.1 * _error(TablePredictor(profile=profile), held_out, 1)
    chosen = choose_predictor(trace, profile, ep_size=4, batch=128)
    assert isinstance(chosen, RidgePredictor)
    assert chosen.depth >= 1


def test_scores_equal_the_written_out_formula():
    trace = planted_trace(seed=3, requests=20)
    profile = RoutingProfile.from_trace(trace, vocab_size=64)
    ridge = RidgePredictor.fit(trace, profile, depth=1)
    token = 17
    counts = profile.token_expert[1][[trace.token_id[token]]].toarray()[0]
    seen = counts.sum() / 2
    prior = profile.load[1] * 2 / profile.load[1].sum()
    table = (counts + prior) / (seen + 1)
    features = np.concatenate([table, table * np.log1p(seen), [np.log1p(seen), 1]])
    expected = features @ ridge.token_weight[1]
    expected += sum(ridge.history_weight[1, 0, expert] for expert in trace.experts[token, 0])
    scores = ridge.expert_scores(context_of(trace, 1, np.array([token])))[0]
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_training_scores_do_not_see_the_occurrence_they_predict():
    trace = planted_trace(seed=4, requests=20)
    token_id = trace.token_id.copy()
    token_id[0] = 63
    token_id[1:][token_id[1:] == 63] = 62
    trace = dataclasses.replace(trace, token_id=token_id)
    other = trace.experts.copy()
    other[0, 0] = (other[0, 0] + 1) % 16
    scores = []
    fitted = RidgePredictor.fit(trace, RoutingProfile.from_trace(trace, vocab_size=64), depth=0)
    for experts in (trace.experts, other):
        changed = dataclasses.replace(trace, experts=experts)
        profile = dataclasses.replace(
            RoutingProfile.from_trace(changed, vocab_size=64),
            load=fitted.profile.load,
        )
        ridge = dataclasses.replace(fitted, profile=profile)
        scores.append(ridge.training_scores(changed, 0, np.array([0])))
    np.testing.assert_allclose(scores[0], scores[1])


def test_unknown_and_unseen_ids_fall_back_to_popularity():
    trace = planted_trace(seed=5, requests=20)
    profile = RoutingProfile.from_trace(trace, vocab_size=80)
    context = dataclasses.replace(
        context_of(trace, 0, np.arange(3)), token_id=np.array([-1, 79, 500])
    )
    scores = TablePredictor(profile=profile).expert_scores(context)
    load = profile.load[0]
    np.testing.assert_allclose(scores, np.tile(2 * load / load.sum(), (3, 1)), rtol=1e-5)


def test_a_rank_is_worth_its_expected_activations_and_the_copy_that_any_of_them_saves():
    trace = planted_trace(seed=6, requests=20)
    table = TablePredictor(profile=RoutingProfile.from_trace(trace, vocab_size=64))
    context = context_of(trace, 1, np.arange(5))
    chance = table.expert_scores(context).reshape(5, 4, 4)
    expected = chance.sum(axis=2) + 2 * (1 - np.prod(1 - chance, axis=2))
    scores = table.rank_scores(context, CONTIGUOUS)
    np.testing.assert_allclose(
        scores - scores.mean(axis=1, keepdims=True),
        expected - expected.mean(axis=1, keepdims=True),
        atol=1e-5,
    )


def test_a_handful_of_tokens_gets_the_plain_table():
    trace = planted_trace(requests=4)
    profile = RoutingProfile.from_trace(trace)
    chosen = choose_predictor(trace, profile, ep_size=4, batch=128)
    assert isinstance(chosen, TablePredictor)


def _one_cancels_the_other(seed: int) -> RoutingTrace:
    """Layer 1 uses expert 2 after both or neither of experts 0 and 1, and expert 3 after one."""
    trace = planted_trace(seed=seed, requests=60)
    experts = trace.experts.copy()
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 2, (2, trace.num_tokens))
    experts[:, 0] = np.stack([np.where(first, 0, 4), np.where(second, 1, 5)], axis=1)
    experts[:, 1] = np.stack([2 + (first ^ second), np.full(trace.num_tokens, 8)], axis=1)
    return dataclasses.replace(trace, experts=experts)


def test_a_perceptron_corrects_what_no_sum_expresses():
    trace, held_out = _one_cancels_the_other(1), _one_cancels_the_other(2)
    profile = RoutingProfile.from_trace(trace, vocab_size=64)
    linear, corrected = (
        RidgePredictor.fit(trace, profile, depth=1, corrected=corrected)
        for corrected in (False, True)
    )
    assert _error(corrected, held_out, 1) < 0.2 * _error(linear, held_out, 1)
    again = RidgePredictor.fit(trace, profile, depth=1, corrected=True)
    context = context_of(held_out, 1)
    np.testing.assert_array_equal(again.expert_scores(context), corrected.expert_scores(context))
