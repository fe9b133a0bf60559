from __future__ import annotations

import pytest

from benchmarks.plan_protocol import count, learn, place
from semantic_ep.plan.policies import policies
from tests.unit.plan.synthetic import planted_trace


def test_methods_are_counted_a_layer_and_on_average_with_and_without_a_schedule():
    profiled, evaluated = planted_trace(seed=1).split(0.5, seed=0)
    learned = learn(profiled, ep_size=4, seed=0, predict=True)
    placement, seconds = place(learned, policies()["contiguous"], ep_size=4, seed=0)
    assert seconds > 0
    rows = count(evaluated, placement, None, "tokens")
    assert [row["layer"] for row in rows] == [0, 1, "mean"]
    assert rows[-1]["lar"] == pytest.approx((rows[0]["lar"] + rows[1]["lar"]) / 2)
    assert rows[-1]["tokens_max_over_mean"] == pytest.approx(1.0, abs=0.01)
    scheduled = count(evaluated, placement, learned, "tokens")
    assert scheduled[-1]["lar"] > rows[-1]["lar"]
