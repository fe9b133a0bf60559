import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semantic_ep.integrations.paged_decoding import Row, decode, rows_of

KEY_HEADS, QUERY_HEADS, SIZE, POSITIONS = 2, 4, 8, 200


@st.composite
def sequences(draw):
    """Rising ranges, often of equal length and distance."""
    ranges, at = [], draw(st.integers(0, 5))
    for _ in range(draw(st.integers(1, 6))):
        length = draw(st.sampled_from([1, 7, 7, 7, 12]))
        ranges.append((at, at + length))
        at += length + draw(st.sampled_from([0, 3, 3, 3, 8]))
    return ranges


@given(sequences())
def test_rows_are_the_sequences_in_order(ranges):
    rows = rows_of(ranges)
    told = [
        (row.begin + number * row.distance, row.begin + number * row.distance + row.length)
        for row in rows
        for number in range(row.count)
    ]
    assert told == ranges


def test_neighbours_of_equal_length_at_equal_distances_are_one_row():
    assert rows_of([(0, 5), (10, 15), (20, 25), (31, 36), (40, 44)]) == [
        Row(begin=0, length=5, distance=10, count=3),
        Row(begin=31, length=5),
        Row(begin=40, length=4),
    ]


@pytest.mark.parametrize("sink", [False, True])
@given(ranges=sequences(), window=st.sampled_from([None, 1, 5, 100]))
def test_every_sequence_attends_to_its_own_positions(ranges, window, sink):
    draw = torch.Generator().manual_seed(0)
    pools = tuple(torch.randn(KEY_HEADS, POSITIONS, SIZE, generator=draw) for _ in range(2))
    query = torch.randn(QUERY_HEADS, len(ranges), SIZE, generator=draw)
    sink_H = torch.randn(QUERY_HEADS, generator=draw) if sink else None
    got = decode(rows_of(ranges), query, pools, window, 0.3, sink_H)
    assert got.shape == (len(ranges), QUERY_HEADS, SIZE)
    for number, (begin, end) in enumerate(ranges):
        begin = begin if window is None else max(begin, end - window)
        for head in range(QUERY_HEADS):
            key, value = (pool[head // (QUERY_HEADS // KEY_HEADS), begin:end] for pool in pools)
            scores = key @ query[head, number] * 0.3
            if sink_H is not None:
                scores = torch.cat([scores, sink_H[head : head + 1]])
            weights = scores.softmax(0)[: end - begin]
            torch.testing.assert_close(got[number, head], weights @ value, atol=1e-5, rtol=1e-5)


@given(sequences())
def test_the_newest_position_of_each_sequence_is_its_last(ranges):
    pool_JSD = torch.arange(float(KEY_HEADS * POSITIONS * SIZE)).view(KEY_HEADS, POSITIONS, SIZE)
    newest = torch.cat([row.newest(pool_JSD) for row in rows_of(ranges)], dim=1)
    assert torch.equal(newest, pool_JSD[:, [end - 1 for _, end in ranges]])
