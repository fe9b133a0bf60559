import numpy as np

from semantic_ep.plan.schedule import Schedule
from semantic_ep.serve.scheduling.offline import by_affinity, round_robin


def schedule(request_affinity):
    vocab = len(request_affinity)
    return Schedule(
        token_to_rank=np.zeros((1, vocab), dtype=np.int8),
        confidence=np.zeros((1, vocab), dtype=np.uint8),
        request_affinity=np.asarray(request_affinity, dtype=np.float16),
    )


def test_round_robin_deals_requests_in_order_of_arrival():
    assert round_robin(5, 2).tolist() == [0, 1, 0, 1, 0]


def test_requests_go_where_their_tokens_experts_are():
    table = schedule([[0.9, 0.1], [0.1, 0.9]])
    prompts = [[1, 1, 1], [0, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert by_affinity(prompts, table, max_new_tokens=4).tolist() == [1, 0, 1, 0]


def test_equal_tokens_a_rank_come_before_affinity():
    prompts = [[0] * 10] * 8
    ranks = by_affinity(prompts, schedule([[1.0, 0.0]]), max_new_tokens=6)
    assert np.bincount(ranks).tolist() == [4, 4]


def test_what_is_generated_counts_by_the_schedule_of_its_own():
    prompts, generated = schedule([[0.6, 0.4], [0.4, 0.6]]), schedule([[0.1, 0.9], [0.9, 0.1]])
    requests = [[0, 0], [1, 1]]
    for new_tokens, ranks in ((0, [0, 1]), (100, [1, 0])):
        assert (
            by_affinity(
                requests, prompts, max_new_tokens=new_tokens, decode_schedule=generated
            ).tolist()
            == ranks
        )
