from __future__ import annotations

import numpy as np
import pytest

from benchmarks.bench_plan_scale import drawn_profile
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan.bounds import KnownRoutes
from tests.unit.plan.synthetic import planted_trace


def test_a_drawn_profile_has_the_asked_size_and_consistent_counts():
    template = RoutingProfile.from_trace(planted_trace())
    drawn = drawn_profile(template, layers=3, experts=32, top_k=4, vocab=500)
    assert drawn.load.shape == (3, 32)
    assert drawn.vocab_size == 500
    for layer in range(3):
        per_id = np.asarray(drawn.token_expert[layer].sum(axis=1)).ravel()
        np.testing.assert_allclose(per_id, 4 * drawn.token_count, rtol=1e-4)
        assert drawn.load[layer].sum() == pytest.approx(4 * drawn.tokens, rel=1e-4)


def test_a_drawn_profile_is_as_concentrated_as_its_template():
    template = RoutingProfile.from_trace(planted_trace(noise=0.0))
    drawn = drawn_profile(template, layers=1, experts=16, top_k=2, vocab=64)
    used = np.diff(drawn.token_expert[0].indptr)
    assert used.max() <= np.diff(template.token_expert[0].indptr).max()


def test_known_routes_expect_exactly_what_happened():
    trace = planted_trace(requests=4)
    scores = KnownRoutes(trace=trace).training_scores(trace, 1, np.arange(10))
    for token in range(10):
        assert set(np.flatnonzero(scores[token])) == set(trace.experts[token, 1])
