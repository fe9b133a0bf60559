import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from semantic_ep.plan.placement import Placement
from semantic_ep.plan.predictors import Context
from semantic_ep.plan.schedule import Schedule
from semantic_ep.plan.slices import equal_slices
from semantic_ep.plan.token_schedule import SchedulePredictor, home_ranks


@given(st.integers(0, 17), st.integers(1, 5), st.integers(0, 1000))
def test_no_rank_gets_more_than_its_share_and_no_equal_slices_score_higher(tokens, ranks, seed):
    scores = np.random.default_rng(seed).random((2, tokens, ranks))
    for layer, home in enumerate(home_ranks(scores)):
        assert home.shape == (tokens,)
        assert np.bincount(home, minlength=ranks).max(initial=0) <= -(-tokens // ranks)
        exact = equal_slices(scores[layer])
        row = np.arange(tokens)
        gained = scores[layer, row, home].sum()
        assert gained >= scores[layer, row, exact].sum() - 1e-5


def test_a_step_of_one_token_runs_where_it_scores_most():
    assert home_ranks(np.array([[0.1, 0.2, 0.7]])).tolist() == [2]


def test_tables_score_the_rank_they_name_and_say_nothing_of_unknown_ids():
    predictor = SchedulePredictor(
        schedule=Schedule(
            token_to_rank=np.array([[1, -1]], dtype=np.int8),
            confidence=np.array([[153, 0]], dtype=np.uint8),
            request_affinity=np.full((2, 3), 1 / 3, dtype=np.float16),
        )
    )
    ids = np.array([0, 1, -1, 7])
    context = Context(layer=0, token_id=ids, history=np.empty((4, 0, 1), dtype=np.int64))
    placement = Placement.contiguous(num_layers=1, num_experts=3, ep_size=3)
    scores = predictor.rank_scores(context, placement)
    np.testing.assert_allclose(scores[0], [0.2, 0.6, 0.2])
    np.testing.assert_allclose(scores[1:], 1 / 3)
