import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semantic_ep.errors import BackendError
from semantic_ep.runtime.shuffle import permutation_of


@given(st.integers(1, 8), st.integers(0, 40), st.randoms(use_true_random=False))
def test_each_slice_holds_its_tokens_in_order_then_padding(ranks, tokens, random):
    schedule = [place % ranks for place in range(tokens)]
    random.shuffle(schedule)
    permutation = permutation_of(torch.tensor(schedule, dtype=torch.long), ranks)
    per_slice = -(-tokens // ranks)
    assert permutation.dtype == torch.int32
    assert len(permutation) == ranks * per_slice
    for rank, row in enumerate(permutation.view(ranks, per_slice).tolist()):
        mine = [token for token, owner in enumerate(schedule) if owner == rank]
        assert row == mine + [-1] * (per_slice - len(mine))


def test_unequal_slices_are_refused_with_the_loads():
    with pytest.raises(BackendError, match=r"\[3, 1\] tokens by rank.*at most 2 of 4"):
        permutation_of(torch.tensor([0, 0, 0, 1]), 2)


@pytest.mark.parametrize("rank", [-1, 2])
def test_ranks_outside_the_group_are_refused(rank):
    with pytest.raises(BackendError, match="Allowed: 0 to 1"):
        permutation_of(torch.tensor([0, rank]), 2)
