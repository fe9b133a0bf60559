"""What cannot work must say so: on every rank, with the number and the remedy."""

import shutil
import subprocess

import numpy as np
import pytest

from semantic_ep.errors import BackendError, PeerFailureError
from semantic_ep.runtime.kernels import build
from semantic_ep.runtime.kernels.endpoint import MoeHeap, ShuffleHeap
from tests.kernels.virtual_group import (
    MoeCase,
    MoePass,
    VirtualGroup,
    moe_heap,
    storage,
)
from tests.kernels.virtual_shuffle import ShuffleCase, shuffle_arguments


def queued_passes(emulator, case, *, capacity=None, timeout_s=0.0):
    """One pass of every rank, not yet queued."""
    emulator.configure(seed=0)
    heap = moe_heap(case, capacity)
    group = VirtualGroup(emulator, heap.offsets()["end"], case.ranks, timeout_s=timeout_s)
    rng = np.random.default_rng(0)
    return group, [MoePass(group, heap, case, rank, rng) for rank in range(case.ranks)]


def test_capacity_overflow_fails_on_every_rank_in_the_same_step(emulator):
    case = MoeCase(tokens=(9, 2, 2), topk=6, dropped=0.0)
    group, passes = queued_passes(emulator, case, capacity=3)
    for one in passes:
        one.queue()
    emulator.synchronize()
    with pytest.raises(BackendError, match=r"dispatch failed on rank 0 of 3: 9 rows for rank \d"):
        group.endpoints[0].raise_failure()
    for endpoint in group.endpoints[1:]:
        with pytest.raises(PeerFailureError, match="rank 0 reported a failure of its own"):
            endpoint.raise_failure()


def test_too_many_rows_for_a_fixed_buffer_are_reported(emulator):
    case = MoeCase(tokens=(8, 8), dropped=0.0, backward=False)
    group, passes = queued_passes(emulator, case)
    for one in passes:
        one._common["max_rows"] = 3
        one.queue()
    emulator.synchronize()
    with pytest.raises((BackendError, PeerFailureError), match=r"more than max_rows|of its own"):
        group.raise_failures()


@pytest.mark.parametrize("bad", [6, -2])
def test_a_slot_outside_the_group_is_reported(emulator, bad):
    case = MoeCase(tokens=(4, 4))
    group, passes = queued_passes(emulator, case)
    passes[1].slot_TK[2, 0] = bad
    for one in passes:
        one.queue()
    emulator.synchronize()
    with pytest.raises(BackendError, match=f"{bad} is not a slot"):
        group.endpoints[1].raise_failure()
    with pytest.raises(PeerFailureError, match="rank 1 reported"):
        group.endpoints[0].raise_failure()


def test_a_silent_peer_ends_in_a_time_out(emulator):
    case = MoeCase(tokens=(4, 4, 4))
    group, passes = queued_passes(emulator, case, timeout_s=0.2)
    for rank in (0, 2):
        passes[rank].queue()
    emulator.synchronize()
    for rank in (0, 2):
        with pytest.raises(PeerFailureError, match=r"did not answer within 0\.2 s|failure of its"):
            group.endpoints[rank].raise_failure()


def test_without_a_time_out_the_emulator_names_the_deadlock(emulator):
    group, passes = queued_passes(emulator, MoeCase(tokens=(4, 4)))
    passes[0].queue()
    with pytest.raises(RuntimeError, match=r"deadlock.*device 0: receive"):
        emulator.synchronize()
    # The emulator is usable afterwards.
    group, passes = queued_passes(emulator, MoeCase(tokens=(4, 4)))
    for one in passes:
        one.queue()
    emulator.synchronize()
    group.raise_failures()


def test_ranks_that_shuffle_differently_are_told(emulator):
    emulator.configure(seed=0)
    case = ShuffleCase(ranks=2, num_rows=6)
    heap = ShuffleHeap(num_ranks=2, max_rows_per_rank=3, row_bytes=2 * case.hidden)
    group = VirtualGroup(emulator, heap.offsets()["end"], 2)
    x = storage((6, case.hidden), case.dtype)
    out = [storage((3, case.hidden), case.dtype) for _ in range(2)]
    same = np.arange(6, dtype=np.int32)
    other = same[[1, 0, 2, 3, 4, 5]]
    for endpoint, permutation in zip(group.endpoints, (same, other), strict=True):
        endpoint.queue_reduce_scatter(
            shuffle_arguments(
                endpoint, heap, case, permutation, x, out[endpoint.rank], group.memory
            )
        )
    emulator.synchronize()
    for endpoint in group.endpoints:
        with pytest.raises(BackendError, match="shuffles by another permutation"):
            endpoint.raise_failure()


def test_a_heap_beyond_the_limits_is_refused():
    with pytest.raises(BackendError, match=r"topk = 17. Allowed: 1 to 16"):
        MoeHeap(num_ranks=2, slots_per_rank=9, capacity=1, topk=17, row_bytes=16, partial_bytes=16)


DIVERGENT = """
#include "portable.h"
struct Arguments { int which; };
__global__ void divergent(const Arguments a) {
  if (a.which == 0) { if (threadIdx.x < 32) __syncthreads(); else { __syncthreads(); } }
  if (a.which == 1 && threadIdx.x < 32) __syncthreads();
  if (a.which == 2 && threadIdx.x % 2) __ballot_sync(0xffffffffu, 1);
  if (a.which == 3) __ballot_sync(1u, 1);
}
struct Launch { int blocks, threads; void* stream; };
extern "C" int launch_divergent(int which, void* stream) {
  Launch launch{1, 64, stream};
  SEP_LAUNCH(launch, divergent, Arguments{which});
  return 0;
}
"""


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (0, "divergent barrier"),
        (1, "divergent barrier: threads of the block have returned"),
        (2, "deadlock: every thread waits"),
        (3, "with mask 00000001"),
    ],
)
def test_the_emulator_reports_divergence(tmp_path, which, message):
    cxx = shutil.which(str(build.find_cxx() or "c++"))
    if cxx is None:
        pytest.skip("no C++17 compiler on PATH or in CXX")
    import ctypes

    source, library = tmp_path / "divergent.cpp", tmp_path / "divergent.so"
    # Barriers are told apart by line.
    source.write_text(DIVERGENT.replace("else {", "else {\n"))
    subprocess.run(
        [
            *(cxx, "-std=c++17", "-O1", "-fPIC", "-shared", "-w", f"-I{build.SOURCES}"),
            *(str(source), str(build.SOURCES / "emu" / "emu.cpp"), "-o", str(library)),
        ],
        check=True,
    )
    dll = ctypes.CDLL(str(library))
    dll.sep_emu_new_stream.restype = ctypes.c_void_p
    dll.sep_emu_error.restype = ctypes.c_char_p
    dll.launch_divergent(which, ctypes.c_void_p(dll.sep_emu_new_stream(0)))
    assert dll.sep_emu_synchronize() == 1
    assert message in dll.sep_emu_error().decode()
