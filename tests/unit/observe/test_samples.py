"""Samples of whole sequences are put together from what several processes hold of them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from semantic_ep.observe.samples import join_layers, merge_samples, no_samples

LAYERS, TOP_K = 3, 2


def sampled(seed, sequences, layers, max_tokens):
    """What a process keeps of numbered sequences, seeing these layers of their tokens."""
    held = no_samples(len(layers), TOP_K)
    for number in sequences:
        draw = np.random.default_rng([seed, number])
        length = int(draw.integers(1, 5))
        arrived = {
            "key": draw.random(1),
            "token_id": draw.integers(0, 90, length).astype(np.int32),
            "experts": draw.integers(0, 8, (length, LAYERS, TOP_K), np.uint16)[:, layers],
            "length": np.array([length]),
            "seen": np.full(1, float(length)),
        }
        held = merge_samples(held, arrived, max_tokens)
    return held


@given(st.integers(0, 99), st.integers(0, 12), st.integers(0, 40))
def test_layers_that_were_sampled_apart_are_those_of_one_process_with_all(seed, count, tokens):
    shares = [[0], [], [1, 2]]
    parts = [sampled(seed, range(count), layers, tokens) for layers in shares]
    joined = join_layers(parts, shares, LAYERS)
    whole = sampled(seed, range(count), list(range(LAYERS)), tokens)
    assert joined["seen"] == 3 * whole["seen"]
    for name in ("key", "length", "experts", "token_id"):
        assert joined[name].dtype == whole[name].dtype
        np.testing.assert_array_equal(joined[name], whole[name], name)


def test_a_sequence_that_one_process_lacks_is_left_out():
    shares = [[0], [1, 2]]
    full, less = sampled(5, range(6), [0], 99), sampled(5, [0, 1, 3, 5], [1, 2], 99)
    joined = join_layers([full, less], shares, LAYERS)
    kept = sampled(5, [0, 1, 3, 5], list(range(LAYERS)), 99)
    for name in ("key", "length", "experts", "token_id"):
        np.testing.assert_array_equal(joined[name], kept[name], name)
