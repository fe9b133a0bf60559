"""Shuffled reduce-scatter and all-gather on virtual ranks, against float64. No torch."""

from __future__ import annotations

import dataclasses

import numpy as np

from semantic_ep.runtime.kernels import abi
from semantic_ep.runtime.kernels.endpoint import Endpoint, ShuffleHeap
from tests.kernels.virtual_group import (
    ACCUMULATION,
    DTYPES,
    ROUNDING,
    SMALLEST,
    Memory,
    VirtualGroup,
    decode,
    encode,
    storage,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShuffleCase:
    """Shuffled reduce-scatter, then shuffled all-gather of the result, several times."""

    ranks: int
    num_rows: int
    hidden: int = 24
    dtype: str = "bf16"
    seed: int = 0
    iterations: int = 2


def draw_permutation(case: ShuffleCase, rng: np.random.Generator) -> np.ndarray:
    """[G * rows_per_rank] int32, with -1 where slices are padded."""
    rows_per_rank = -(-case.num_rows // case.ranks)
    permutation = np.full(case.ranks * rows_per_rank, -1, np.int32)
    permutation[: case.num_rows] = rng.permutation(case.num_rows)
    return rng.permutation(permutation).astype(np.int32)


def shuffle_arguments(
    endpoint: Endpoint,
    heap: ShuffleHeap,
    case: ShuffleCase,
    permutation: np.ndarray,
    x: np.ndarray,
    out: np.ndarray,
    memory: Memory,
) -> abi.Shuffle:
    offsets = heap.offsets()
    del offsets["end"]
    return abi.Shuffle(
        group=endpoint.group,
        rows_per_rank=len(permutation) // case.ranks,
        num_rows=case.num_rows,
        hidden=case.hidden,
        row_bytes=heap.row_bytes,
        row_stride=heap.row_stride,
        dtype=DTYPES[case.dtype],
        permutation=memory.address(permutation),
        x=memory.address(x),
        out=memory.address(out),
        **offsets,
    )


def run_shuffle(
    library: abi.EmulatorLibrary, case: ShuffleCase, memory: Memory | None = None
) -> None:
    """Queue all iterations of all ranks, run them, and check every output."""
    library.configure(seed=case.seed)
    rng = np.random.default_rng(case.seed)
    permutations = [draw_permutation(case, rng) for _ in range(case.iterations)]
    rows_per_rank = len(permutations[0]) // case.ranks
    row_bytes = case.hidden * storage((1,), case.dtype).itemsize
    heap = ShuffleHeap(num_ranks=case.ranks, max_rows_per_rank=rows_per_rank, row_bytes=row_bytes)
    group = VirtualGroup(library, heap.offsets()["end"], case.ranks, memory=memory)
    shape, slice_shape = (case.num_rows, case.hidden), (rows_per_rank, case.hidden)
    x = [
        [encode(rng.standard_normal(shape), case.dtype) for _ in range(case.ranks)]
        for _ in range(case.iterations)
    ]
    slices = [
        [storage(slice_shape, case.dtype) for _ in range(case.ranks)]
        for _ in range(case.iterations)
    ]
    gathered = [
        [storage(shape, case.dtype) for _ in range(case.ranks)] for _ in range(case.iterations)
    ]
    launches = []
    for rank in rng.permutation(case.ranks):
        endpoint = group.endpoints[rank]
        for i, permutation in enumerate(permutations):
            for queue, source, target in (
                (endpoint.queue_reduce_scatter, x, slices),
                (endpoint.queue_all_gather, slices, gathered),
            ):
                rows, out = source[i][rank], target[i][rank]
                arguments = shuffle_arguments(
                    endpoint, heap, case, permutation, rows, out, group.memory
                )
                launches.append((queue, arguments))
    group.memory.settle()
    for queue, arguments in launches:
        queue(arguments)
    library.synchronize()
    group.raise_failures()
    group.memory.fetch()
    for i, permutation in enumerate(permutations):
        parts = np.stack([decode(one, case.dtype) for one in x[i]])
        for rank in range(case.ranks):
            mine = permutation[rank * rows_per_rank :][:rows_per_rank]
            total = np.where(mine[:, None] < 0, 0, parts.sum(axis=0)[mine])
            bound = (
                ROUNDING[case.dtype] * 1.01 * abs(total)
                + ACCUMULATION[case.dtype] * abs(parts).sum(axis=0)[mine]
            )
            error = abs(decode(slices[i][rank], case.dtype) - total)
            assert (error <= bound + SMALLEST[case.dtype]).all()
        for rank in range(case.ranks):
            for m, row in enumerate(permutation):
                if row >= 0:
                    expected = slices[i][m // rows_per_rank][m % rows_per_rank]
                    np.testing.assert_array_equal(gathered[i][rank][row], expected)
