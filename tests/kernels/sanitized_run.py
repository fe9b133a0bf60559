"""Runs cases in a process that preloads a sanitizer: `python sanitized_run.py LIBRARY SUITE`.

SUITE is `all`, or `protocol`: the cases that libraries built with SEP_ONE_TYPE can run.
"""

import sys
from pathlib import Path

from semantic_ep.errors import BackendError, PeerFailureError
from semantic_ep.runtime.kernels import abi
from semantic_ep.runtime.kernels.endpoint import EMULATED_GRID
from tests.kernels.virtual_group import (
    MoeCase,
    MoePass,
    VirtualGroup,
    moe_heap,
    run_moe,
)
from tests.kernels.virtual_shuffle import ShuffleCase, run_shuffle


def protocol(library: abi.EmulatorLibrary) -> None:
    """Several ranks, several iterations without a wait in between, one element type."""
    for seed in range(3):
        shape = {"topk": 3, "hidden": 16, "seed": seed, "iterations": 3}
        run_moe(library, MoeCase(tokens=(9, 5), **shape))
        run_moe(library, MoeCase(tokens=(9, 5), own_first=(0, 1)[: 1 + seed % 2], **shape))
        run_moe(library, MoeCase(tokens=(4, 0, 6), max_resident_blocks=1, blocks=3, **shape))
        # Nothing but the flags of this channel keeps a sender from running ahead.
        run_moe(library, MoeCase(tokens=(9, 5, 7), dispatch_only=True, **shape | {"iterations": 5}))
        run_shuffle(library, ShuffleCase(ranks=3, num_rows=14, hidden=16, seed=seed, iterations=3))
    run_moe(library, MoeCase(tokens=(EMULATED_GRID.count_threads + 9, 5), topk=2, hidden=8))
    failure_is_seen_by_all_ranks(library)


def failure_is_seen_by_all_ranks(library: abi.EmulatorLibrary) -> None:
    """Rank 0 overflows its capacity; every rank must fail in the same exchange."""
    import numpy as np

    case = MoeCase(tokens=(6, 2, 2), topk=6, hidden=16, dropped=0.0)
    heap = moe_heap(case, capacity=3)
    group = VirtualGroup(library, heap.offsets()["end"], case.ranks)
    rng = np.random.default_rng(0)
    passes = [MoePass(group, heap, case, rank, rng) for rank in range(case.ranks)]
    for one in passes:
        one.queue()
    library.synchronize()
    for endpoint in group.endpoints:
        try:
            endpoint.raise_failure()
        except (BackendError, PeerFailureError):
            continue
        raise AssertionError(f"rank {endpoint.rank} took a partial result for a whole one")


def every_type(library: abi.EmulatorLibrary) -> None:
    """Odd sizes and all element types: what address and undefined-behaviour checks look for."""
    for dtype in ("bf16", "f16", "f32", "f64"):
        for hidden in (1, 7, 24, 136):
            run_moe(library, MoeCase(tokens=(7, 3), hidden=hidden, dtype=dtype, scale_bytes=4))
            run_shuffle(library, ShuffleCase(ranks=2, num_rows=7, hidden=hidden, dtype=dtype))
    run_moe(library, MoeCase(tokens=(7, 3), hidden=13, quantised=True, scale_bytes=4))
    run_moe(library, MoeCase(tokens=(5,) * 8, topk=8))


if __name__ == "__main__":
    loaded = abi.EmulatorLibrary(Path(sys.argv[1]))
    protocol(loaded)
    if sys.argv[2] == "all":
        every_type(loaded)
    print("clean")
