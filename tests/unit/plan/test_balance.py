"""Ranks that are level on one workload's load stay nearly level on another's."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semantic_ep.errors import PlacementError
from semantic_ep.plan.balance import DriftModel, copies_by_share, place_for_load
from semantic_ep.plan.baselines import eplb_placement
from semantic_ep.plan.baselines.eplb import replicate_experts

LOADS = Path(__file__).parents[4] / "shared" / "data" / "loads"


def mean_over_max(placement, load):
    share = load / placement.logical_count
    slots = np.take_along_axis(share, placement.physical_to_logical_map, axis=1)
    ranks = slots.reshape(len(load), placement.ep_size, -1).sum(axis=2)
    return float((ranks.mean(axis=1) / ranks.max(axis=1)).mean())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 12))
def test_every_expert_is_placed_and_no_rank_holds_two_copies(seed, spare):
    load = np.random.default_rng(seed).lognormal(0, 1, (1, 12))
    placement = place_for_load(load, ep_size=4, redundant_slots=spare)  # validates itself
    assert placement.logical_count.sum() == 12 + spare
    assert placement.slots_per_rank == -(-(12 + spare) // 4)


def test_experts_without_any_load_are_placed():
    placement = place_for_load(np.zeros((1, 8)), ep_size=2, redundant_slots=2)
    assert placement.logical_count.min() == 1


def test_without_drift_the_profile_itself_is_level():
    load = np.random.default_rng(1).lognormal(7, 0.7, (2, 64))
    exact = DriftModel(correlations=(1.0,))
    placement = place_for_load(load, ep_size=8, redundant_slots=8, drift=exact)
    assert mean_over_max(placement, load) > 0.995


def test_copies_follow_eplb_where_nothing_is_uncertain():
    load = np.random.default_rng(2).random((1, 16)) + 0.1
    expected = replicate_experts(load, 24)[2][0]
    np.testing.assert_array_equal(copies_by_share(load, 24, max_copies=99), expected)


def test_no_expert_gets_more_copies_than_ranks():
    load = np.ones((1, 8))
    load[0, 3] = 1e6
    assert place_for_load(load, ep_size=2, redundant_slots=4).logical_count.max() == 2


def test_moments_keep_the_mean_and_shrink_towards_it():
    load = np.array([10.0, 100, 1000, 10000])
    mean, deviation = DriftModel(correlations=(1.0, 0.5)).moments(load, 2)
    np.testing.assert_allclose(mean.sum(axis=1), 2)
    assert mean[1, 3] < mean[0, 3]
    assert mean[1, 0] > mean[0, 0]
    assert (deviation[0] == 0).all()
    assert (deviation[1] > 0).all()


def test_drift_that_blocks_share_is_borne_better_than_by_eplb():
    rng = np.random.default_rng(4)
    spread, rho, share = 0.8, 0.85, 0.2
    log = rng.normal(0, spread, (6, 128))
    load = 1000 * np.exp(log)
    placement = place_for_load(load, ep_size=16, redundant_slots=16)
    rival = eplb_placement(load, ep_size=16, redundant_slots=16)
    gains = []
    for _ in range(40):
        common = np.repeat(rng.normal(size=(6, 8)), 16, axis=1)
        noise = np.sqrt(1 - share) * rng.normal(size=log.shape) + np.sqrt(share) * common
        other = np.exp(rho * log + spread * np.sqrt(1 - rho**2) * noise)
        gains.append(mean_over_max(placement, other) - mean_over_max(rival, other))
    assert np.mean(gains) > 2 * np.std(gains) / np.sqrt(len(gains))


def test_too_many_slots_are_refused():
    with pytest.raises(PlacementError, match="redundant"):
        place_for_load(np.ones((1, 4)), ep_size=2, redundant_slots=5)


@pytest.mark.skipif(not LOADS.exists(), reason="needs ../shared/data/loads")
def test_planned_on_prefill_it_is_more_level_on_decode_than_eplb():
    def load(name):
        counts = json.loads((LOADS / f"deepseek_v3_{name}.json").read_text())["logical_count"]
        return np.array(counts[3::15], dtype=float)

    planned, other = load("prefill_in1800out100"), load("decode_in1000out1000")
    placement = place_for_load(planned, ep_size=32, redundant_slots=32)
    rival = eplb_placement(planned, ep_size=32, redundant_slots=32)
    assert mean_over_max(placement, other) > mean_over_max(rival, other)
