"""A run changes its placement only when that is worth moving the experts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan import replan
from semantic_ep.plan.baselines import random_placement
from semantic_ep.plan.cost import evaluate
from semantic_ep.plan.drift import measure_drift
from semantic_ep.plan.moving import count_moves
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.replan import MIN_SEQUENCES, propose
from semantic_ep.plan.replicas import add_replicas
from semantic_ep.plan.verdict import home_ranks
from semantic_ep.topology import Topology
from tests.unit.plan.synthetic import planted_trace, random_trace

EARLIER = RoutingProfile.from_trace(planted_trace(seed=1, requests=120))
WINDOW = planted_trace(seed=2)
FORMER = random_placement(num_layers=2, num_experts=16, ep_size=4, seed=4)
SIZES = {
    "topology": Topology.uniform(4),
    "row_bytes": 4096,
    "expert_bytes": 10**6,
    "horizon_tokens": 10**7,
}


def proposed(current=FORMER, *, earlier=EARLIER, window=WINDOW, **changes):
    return propose(earlier, window, current, **{**SIZES, **changes})


def test_a_plan_that_pays_is_proposed_with_what_it_saves_on_routing_after_it():
    found = proposed()
    before, after = (
        evaluate(p, WINDOW, home_ranks(WINDOW, p, None, "requests")).mean()["remote_copies"]
        for p in (FORMER, found.placement)
    )
    assert found.report["remote_copies"] == [before, after]
    assert after < 0.9 * before
    moves = count_moves(found.placement, FORMER, bytes_per_expert=10**6)
    assert found.report["bytes_to_move"] == moves.bytes > 0
    assert found.report["reason"].startswith("pays: moving")


def test_break_even_is_where_the_bytes_of_the_backward_pass_have_paid_too():
    once = proposed(row_bytes=2048).report["break_even_tokens"]
    assert proposed().report["break_even_tokens"] == pytest.approx(once / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("current", "changes", "reason"),
    [
        (FORMER, {"horizon_tokens": 10}, "and 10 are the horizon"),
        (FORMER, {"window": WINDOW.select_requests(range(MIN_SEQUENCES - 1))}, "not judged: 15"),
        (proposed().placement, {}, "the new plan is the one in force"),
        (
            proposed().placement,
            {"earlier": RoutingProfile.from_trace(planted_trace(seed=3, noise=1.0, requests=30))},
            "the busiest rank would gain nothing",
        ),
    ],
)
def test_a_plan_that_does_not_pay_is_kept_back_and_the_report_says_why(current, changes, reason):
    found = proposed(current, **changes)
    assert found.placement is None
    assert reason in found.report["reason"]


def structureless(seed):
    rng = np.random.default_rng(seed)
    trace = random_trace(tokens=2000, layers=2, experts=16, top_k=2, rng=rng)
    return dataclasses.replace(trace, offsets=np.arange(0, 2001, 100))


def test_a_saving_that_may_be_chance_moves_nothing():
    earlier = RoutingProfile.from_trace(structureless(0))
    found = [
        proposed(earlier=earlier, window=structureless(seed), horizon_tokens=10**12)
        for seed in range(1, 9)
    ]
    # An interval of 95 % misses the truth upwards once in forty.
    assert sum(each.placement is not None for each in found) <= 1
    assert any("may be chance" in each.report["reason"] for each in found)


def test_experts_of_uneven_ranks_get_the_slots_there_are():
    uneven = Placement.from_rank_of_expert(
        np.array([[0] * 6 + [1] * 4 + [2] * 3 + [3] * 3] * 2), ep_size=4
    )
    found = proposed(uneven).placement
    assert found.slots_per_rank == 6
    assert found.logical_count.tolist() == [[1] * 16] * 2


# Two spare slots a rank, filled with what has nothing to do with routing.
COPIED = Placement(
    physical_to_logical_map=np.concatenate(
        [
            FORMER.physical_to_logical_map.reshape(2, 4, 4),
            np.roll(FORMER.physical_to_logical_map.reshape(2, 4, 4), 1, axis=1)[:, :, :2],
        ],
        axis=2,
    ).reshape(2, -1),
    num_experts=16,
    ep_size=4,
)


def test_a_run_with_copies_gets_as_many_where_they_save_most():
    found = proposed(COPIED)
    assert found.placement.slots_per_rank == 6
    assert found.placement.logical_count.sum(axis=1).tolist() == [24, 24]
    before, after = found.report["remote_copies"]
    assert after < 0.9 * before
    moves = count_moves(found.placement, COPIED, bytes_per_expert=10**6)
    assert found.report["bytes_to_move"] == moves.bytes
    again = proposed(found.placement)
    assert again.placement is None
    assert "the new plan is the one in force" in again.report["reason"]


def test_the_choice_of_copies_looks_at_frequent_tokens_first_where_time_is_short(monkeypatch):
    entries = sum(table.nnz for table in EARLIER.token_expert)
    seen = []

    def watched(placement, profile, **settings):
        seen.append(profile.token_count)
        return add_replicas(placement, profile, **settings)

    monkeypatch.setattr(replan, "add_replicas", watched)
    for share in (2, 0.5):
        # For 16 pairs of ranks, before the 2 spare slots of a rank are filled and after each.
        monkeypatch.setattr(replan, "SECONDS_AN_ENTRY", 5 / (16 * 3 * entries * share))
        found = proposed(COPIED, time_limit=5)
        assert found.placement.logical_count.sum() == 2 * 24
    whole, half = seen
    np.testing.assert_array_equal(whole, EARLIER.token_count)
    assert 0 < np.count_nonzero(half) < np.count_nonzero(whole)
    assert half[half > 0].min() >= whole[half == 0].max()


def test_copies_that_nothing_can_be_taken_from_are_filled_anew_and_priced():
    first = COPIED.first_copies
    assert first.logical_count.tolist() == [[1] * 16] * 2
    np.testing.assert_array_equal(first.rank_of_expert, COPIED.rank_of_expert)
    found = proposed(COPIED, sources=first)
    moves = count_moves(found.placement, first, bytes_per_expert=10**6)
    assert found.report["bytes_to_move"] == moves.bytes
    # Every spare slot gets its copy from another rank, even one that it had.
    assert moves.bytes >= 16 * 10**6
    again = proposed(found.placement, sources=found.placement.first_copies)
    assert "the new plan is the one in force" in again.report["reason"]


def test_drift_of_a_recorder_that_went_on_is_that_of_its_new_counts():
    other = planted_trace(seed=3)
    other = dataclasses.replace(other, experts=(other.experts * 5 + 3) % 16)
    fresh = RoutingProfile.from_trace(other, vocab_size=EARLIER.vocab_size)
    both = dataclasses.replace(
        EARLIER,
        load=0.5 * EARLIER.load + fresh.load,
        token_count=0.5 * EARLIER.token_count + fresh.token_count,
    )
    alone, within = measure_drift(EARLIER, fresh), measure_drift(EARLIER, both, included=0.5)
    np.testing.assert_allclose(within.load_distance, alone.load_distance)
    assert within.token_distance == pytest.approx(alone.token_distance)
