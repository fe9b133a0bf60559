from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from semantic_ep.errors import PlacementError
from semantic_ep.plan.requests import assign_in_windows, assign_requests
from semantic_ep.plan.slices import (
    equal_slices,
    natural_slices,
    slice_sizes,
    slices_in_batches,
)


@given(
    tokens=st.integers(1, 60),
    ranks=st.integers(1, 8),
    levels=st.sampled_from([2, 5, 1000]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_equal_slices_are_exact_in_size_and_optimal_in_score(tokens, ranks, levels, seed):
    scores = np.random.default_rng(seed).integers(levels, size=(tokens, ranks)) / levels
    home = equal_slices(scores)
    sizes = slice_sizes(tokens, ranks)
    assert np.bincount(home, minlength=ranks).tolist() == sizes.tolist()
    columns = np.repeat(np.arange(ranks), sizes)
    rows, chosen = linear_sum_assignment(-scores[:, columns])
    best = scores[rows, columns[chosen]].sum()
    assert scores[np.arange(tokens), home].sum() == pytest.approx(best, abs=1e-4)


def test_a_batch_alone_and_a_batch_among_others_are_sliced_alike():
    scores = np.random.default_rng(0).random((3, 64, 4))
    together = equal_slices(scores)
    alone = np.stack([equal_slices(batch) for batch in scores])
    gains = [
        np.take_along_axis(scores, home[:, :, None], 2).sum(axis=(1, 2))
        for home in (together, alone)
    ]
    np.testing.assert_allclose(gains[0], gains[1], atol=1e-4)


def test_the_last_short_batch_is_sliced_by_itself():
    home = slices_in_batches(np.random.default_rng(1).random((130, 4)), batch=64)
    assert np.bincount(home[128:], minlength=4).tolist() == [1, 1, 0, 0]
    assert np.bincount(natural_slices(130, 4, batch=64)).tolist() == [33, 33, 32, 32]


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(PlacementError, match="finite"):
        equal_slices(np.array([[np.nan, 1.0]]))


@given(seed=st.integers(0, 1000), ranks=st.integers(2, 8))
@settings(max_examples=30, deadline=None)
def test_a_window_of_ordinary_requests_is_balanced_within_five_percent(seed, ranks):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(50, 200, size=64)
    rank = assign_requests(rng.random((64, ranks)) * tokens[:, None], tokens)
    held = np.bincount(rank, weights=tokens, minlength=ranks)
    assert held.max() <= 1.05 * held.mean() + 1e-9


def test_affinity_is_followed_as_far_as_balance_allows():
    scores = np.tile(np.eye(4) * 100, (16, 1))
    assert assign_requests(scores, np.full(64, 100)).tolist() == list(range(4)) * 16


def test_a_request_larger_than_a_fair_share_is_alone_on_its_rank():
    tokens = np.array([1000, 10, 10, 10])
    rank = assign_requests(np.zeros((4, 2)), tokens)
    assert (rank[1:] != rank[0]).all()


def test_tokens_that_ranks_already_hold_count():
    rank = assign_requests(np.zeros((4, 2)), np.full(4, 10), held_G=np.array([40, 0]))
    assert rank.tolist() == [1, 1, 1, 1]


def test_windows_are_balanced_one_by_one():
    tokens = np.full(128, 10)
    rank = assign_in_windows(np.zeros((128, 4)), tokens)
    for start in (0, 64):
        assert np.bincount(rank[start : start + 64]).tolist() == [16] * 4
    assert assign_in_windows(np.zeros((0, 4)), np.zeros(0)).tolist() == []


def test_malformed_windows_are_refused():
    with pytest.raises(PlacementError, match="none negative"):
        assign_requests(np.zeros((2, 2)), np.array([1, -1]))
