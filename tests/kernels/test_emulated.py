"""Every output of every kernel against a float64 reference: in the emulator under adversarial
schedules, and on a GPU where there is one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semantic_ep.runtime.kernels.endpoint import EMULATED_GRID
from tests.kernels.device_memory import DeviceMemory
from tests.kernels.virtual_group import (
    MoeCase,
    decode,
    encode,
    run_moe,
)
from tests.kernels.virtual_shuffle import ShuffleCase, run_shuffle

DTYPE_NAMES = st.sampled_from(["bf16", "f16", "f32", "f64"])


@st.composite
def moe_cases(draw):
    ranks = draw(st.integers(1, 8))
    slots = draw(st.integers(1, 5))
    return MoeCase(
        tokens=tuple(draw(st.lists(st.integers(0, 24), min_size=ranks, max_size=ranks))),
        topk=draw(st.integers(1, min(16, ranks * slots))),
        slots_per_rank=slots,
        hidden=draw(st.integers(1, 70) | st.just(264)),
        dtype=draw(DTYPE_NAMES),
        seed=draw(st.integers(0, 2**32)),
        iterations=draw(st.integers(1, 3)),
        dropped=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        hot_rank=draw(st.booleans()),
        scale_bytes=draw(st.sampled_from([0, 4, 20])),
        quantised=draw(st.booleans()),
        max_resident_blocks=draw(st.integers(0, 2)),
        blocks=draw(st.integers(1, 3)),
        threads=draw(st.sampled_from([32, 64, 96])),
        own_first=tuple(draw(st.sets(st.integers(0, ranks - 1)))),
    )


@given(moe_cases())
@settings(max_examples=60, deadline=None)
def test_dispatch_combine_and_gradients_are_right_for_any_shape_and_schedule(platform, case):
    platform.run(run_moe, case)


@given(
    st.builds(
        ShuffleCase,
        ranks=st.integers(1, 8),
        num_rows=st.integers(0, 40),
        hidden=st.integers(1, 70),
        dtype=DTYPE_NAMES,
        seed=st.integers(0, 2**32),
        iterations=st.integers(1, 3),
    )
)
@settings(max_examples=40, deadline=None)
def test_shuffles_are_right_for_any_shape_and_schedule(platform, case):
    platform.run(run_shuffle, case)


def test_sixty_four_ranks_and_top_sixteen(emulator):
    case = MoeCase(
        tokens=(1,) * 64,
        topk=16,
        slots_per_rank=1,
        hidden=8,
        iterations=1,
        blocks=1,
        threads=32,
        backward=False,
    )
    run_moe(emulator, case)


def test_sixty_four_ranks_shuffle(emulator):
    run_shuffle(emulator, ShuffleCase(ranks=64, num_rows=130, hidden=9, iterations=1))


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_kernels_are_right_one_at_a_time_as_memory_checkers_run_them(serial_platform, dtype):
    shape = {"tokens": (9, 0, 14), "topk": 4, "dtype": dtype, "blocks": 3}
    for hidden in (24, 7):
        serial_platform.run(run_moe, MoeCase(hidden=hidden, scale_bytes=4, **shape))
        shuffle = ShuffleCase(ranks=3, num_rows=14, hidden=hidden, dtype=dtype)
        serial_platform.run(run_shuffle, shuffle)


@pytest.mark.parametrize("hidden", [32, 20, 6, 7])
def test_rows_of_bytes_travel_with_their_scales_at_any_width(platform, hidden):
    case = MoeCase(tokens=(9, 4, 6), hidden=hidden, quantised=True, scale_bytes=4, topk=4)
    platform.run(run_moe, case)


@pytest.mark.parametrize("own_first", [(0, 1, 2), (1,)])
def test_own_rows_come_apart_on_any_of_the_ranks(platform, own_first):
    case = MoeCase(tokens=(9, 4, 6), topk=4, scale_bytes=4, iterations=3, own_first=own_first)
    platform.run(run_moe, case)


@pytest.mark.parametrize("tokens", [(0,), (0, 0, 0, 0), (0, 17, 0, 1)])
def test_ranks_without_tokens_take_part(platform, tokens):
    platform.run(run_moe, MoeCase(tokens=tokens))


def test_several_blocks_share_the_counting_of_many_tokens(platform):
    case = MoeCase(tokens=(130, 70), topk=3, hidden=8, blocks=3, iterations=1)
    platform.run(run_moe, case)


def test_more_slots_than_a_block_has_threads(platform):
    case = MoeCase(tokens=(9, 30), slots_per_rank=40, topk=16, hidden=8, iterations=1)
    assert case.ranks * case.slots_per_rank > EMULATED_GRID.count_threads
    platform.run(run_moe, case)


def test_arrays_that_kernels_see_as_copies_are_brought_back(emulator):
    """How arrays reach a GPU, shown where there is none."""
    run_moe(emulator, MoeCase(tokens=(9, 0, 5)), memory=DeviceMemory("cpu"))
    run_shuffle(emulator, ShuffleCase(ranks=2, num_rows=7), memory=DeviceMemory("cpu"))


def test_one_resident_block_a_device_is_enough(emulator):
    """No block waits for a block of its own grid, so progress never needs two of them at once."""
    case = MoeCase(tokens=(20,) * 4, blocks=4, max_resident_blocks=1, iterations=3)
    run_moe(emulator, case)


def test_results_do_not_depend_on_the_schedule(emulator):
    outputs = []
    for seed in (1, 2, 3):
        case = MoeCase(tokens=(12, 9, 15), topk=4, hidden=40, dtype="f32", iterations=1)
        emulator.configure(seed=seed)
        passes = run_moe(emulator, case)
        outputs.append([one.out_TD.tobytes() for one in passes[0]])
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_every_sixteen_bit_value_survives_dispatch_and_combine(emulator, dtype):
    """One token a rank with weight 1: combine must return each value with the same bits."""
    bits = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    stored = bits.view(np.float16) if dtype == "f16" else bits
    with np.errstate(invalid="ignore"):  # signalling NaNs
        finite = np.isfinite(decode(stored, dtype))
    values = decode(stored[finite], dtype)
    assert (encode(values, dtype).view(np.uint16) == bits[finite]).all()
    case = MoeCase(
        tokens=(1,),
        topk=1,
        slots_per_rank=1,
        hidden=len(values),
        dtype=dtype,
        dropped=0.0,
        backward=False,
    )
    for one in run_moe(emulator, case, y_value=values, weight=1.0)[0]:
        got = one.out_TD.view(np.uint16)[0]
        zero = values == 0  # a sum that starts at +0 has no -0
        assert (got[~zero] == bits[finite][~zero]).all()
        assert (decode(one.out_TD, dtype)[0][zero] == 0).all()
