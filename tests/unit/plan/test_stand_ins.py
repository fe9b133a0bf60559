from __future__ import annotations

import numpy as np
import pytest

from semantic_ep.errors import ConfigError
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.schedule import Schedule
from semantic_ep.plan.stand_ins import with_stand_ins
from tests.unit.plan.synthetic import planted_trace

CONTIGUOUS = Placement.contiguous(num_layers=2, num_experts=16, ep_size=4)


@pytest.fixture
def profile():
    return RoutingProfile.from_trace(planted_trace(seed=1), vocab_size=64)


@pytest.mark.parametrize("width", [24, 600])
def test_an_id_never_seen_is_scheduled_like_the_one_it_is_embedded_close_to(profile, width):
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(70, width)).astype(np.float32)
    plain = Schedule.from_profile(profile, CONTIGUOUS)
    seen = np.flatnonzero(profile.token_count > 0)
    alike = seen[:6]
    # Length says nothing of meaning: one is embedded the same way, far out.
    embedding[64:] = embedding[alike] * np.array([[0.1], [1], [2], [3], [5], [40]])
    embedding[64:] += 0.01 * rng.normal(size=(6, width))
    filled = Schedule.from_profile(with_stand_ins(profile, embedding), CONTIGUOUS)
    for layer in range(2):
        # One occurrence of the stand-in, and one of the average token.
        counts = profile.token_expert[layer][alike].toarray()
        once = counts / counts.sum(axis=1, keepdims=True) + profile.load[layer] / (
            profile.load[layer].sum()
        )
        wanted = once.reshape(6, 4, 4).sum(axis=2).argmax(axis=1)
        np.testing.assert_array_equal(filled.token_to_rank[layer, 64:], wanted)
        assert (filled.confidence[layer, 64:] <= plain.confidence[layer, alike]).all()
        np.testing.assert_array_equal(
            filled.token_to_rank[layer, seen], plain.token_to_rank[layer, seen]
        )


def test_what_was_counted_stays(profile):
    embedding = np.random.default_rng(1).normal(size=(70, 8))
    filled = with_stand_ins(profile, embedding)
    seen = np.flatnonzero(profile.token_count > 0)
    for before, after in zip(profile.token_expert, filled.token_expert, strict=True):
        np.testing.assert_array_equal(after[seen].toarray(), before[seen].toarray())
    np.testing.assert_array_equal(filled.load, profile.load)


def test_an_embedding_of_fewer_ids_than_were_seen_is_refused(profile):
    with pytest.raises(ConfigError, match="not of the tokens that were profiled"):
        with_stand_ins(profile, np.ones((3, 8)))
