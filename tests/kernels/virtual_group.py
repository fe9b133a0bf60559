"""Several ranks in one process, and a float64 reference of what they must compute.

No torch: the same file runs inside processes that preload a sanitizer. On a GPU the arrays are
mirrored by a `Memory` of another file.

Shapes: T tokens of a rank, D hidden, K top-k, S slots a rank, G ranks, R rows of a rank.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from semantic_ep.runtime.kernels import abi
from semantic_ep.runtime.kernels.endpoint import EMULATED_GRID, Endpoint, MoeHeap

DTYPES = {"f32": abi.Dtype.F32, "f16": abi.Dtype.F16, "bf16": abi.Dtype.BF16, "f64": abi.Dtype.F64}
# Half the distance between 1 and the next number.
ROUNDING = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8, "f64": 2.0**-53}
# A sum of up to 64 terms in the accumulator; subnormal halves lose more.
ACCUMULATION = {"f32": 2.0**-18, "f16": 2.0**-18, "bf16": 2.0**-18, "f64": 2.0**-46}
SMALLEST = {"f32": 1e-38, "f16": 2.0**-24, "bf16": 1e-38, "f64": 1e-300}


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round float64 to a storage array of the dtype."""
    if dtype == "bf16":
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype({"f32": np.float32, "f16": np.float16, "f64": np.float64}[dtype])


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Storage array to float64, exactly."""
    if dtype == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


def storage(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An array filled with NaN, so that what was not written shows."""
    return encode(np.full(shape, np.nan), dtype)


# Arrays with an element a row, by field of `abi.Moe`.
ROW_ARRAYS = ("rows", "row_scales", "row_weight", "y", "row_grad", "y_grad", "row_weight_grad")


class Memory(Protocol):
    """Where kernels find the arrays of a test."""

    def address(self, array: np.ndarray) -> int:
        """Of the array, or of a copy of what it holds now."""
        ...

    def visible(self, num_bytes: int) -> int:
        """Address of zeroed bytes that host and kernels see at once."""
        ...

    def settle(self) -> None:
        """Wait until all copies are made."""
        ...

    def fetch(self) -> None:
        """Bring back what kernels wrote into copies."""
        ...


class HostMemory:
    """The arrays themselves: the emulator's memory is the host's."""

    def __init__(self) -> None:
        self._visible: list[np.ndarray] = []

    def address(self, array: np.ndarray) -> int:
        return array.ctypes.data

    def visible(self, num_bytes: int) -> int:
        self._visible.append(np.zeros(num_bytes, np.uint8))
        return self._visible[-1].ctypes.data

    def settle(self) -> None:
        pass

    def fetch(self) -> None:
        pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeCase:
    """One run: `iterations` forward and backward passes, queued without waiting in between."""

    tokens: tuple[int, ...]  # of each rank
    topk: int = 2
    slots_per_rank: int = 3
    hidden: int = 24
    dtype: str = "bf16"
    seed: int = 0
    iterations: int = 2
    dropped: float = 0.1
    hot_rank: bool = False
    scale_bytes: int = 0
    quantised: bool = False  # dispatched rows have a byte an element
    max_resident_blocks: int = 0
    blocks: int = EMULATED_GRID.blocks
    threads: int = EMULATED_GRID.threads
    backward: bool = True
    dispatch_only: bool = False
    own_first: tuple[int, ...] = ()  # ranks that take their own rows apart from those of others

    @property
    def ranks(self) -> int:
        return len(self.tokens)


class VirtualGroup:
    """Heaps, states and endpoints of all ranks, in this process's memory."""

    def __init__(
        self,
        library: abi.EmulatorLibrary,
        heap_bytes: int,
        ranks: int,
        *,
        timeout_s: float = 0.0,
        blocks: int = EMULATED_GRID.blocks,
        threads: int = EMULATED_GRID.threads,
        memory: Memory | None = None,
    ) -> None:
        self.library = library
        self.memory = memory = HostMemory() if memory is None else memory
        self.heaps = [np.zeros(-(-heap_bytes // 16) * 2, np.uint64) for _ in range(ranks)]
        self.states = [np.zeros(ctypes.sizeof(abi.State), np.uint8) for _ in range(ranks)]
        grid = dataclasses.replace(
            EMULATED_GRID, blocks=blocks, local_blocks=blocks, threads=threads
        )
        self.endpoints = []
        for rank in range(ranks):
            stream = library.new_stream(rank)
            endpoint = Endpoint(
                library,
                rank=rank,
                heaps=[memory.address(heap) for heap in self.heaps],
                state=memory.address(self.states[rank]),
                status=memory.visible(ctypes.sizeof(abi.Status)),
                stream=lambda stream=stream: stream,
                grid=grid,
                timeout_s=timeout_s,
            )
            self.endpoints.append(endpoint)

    def raise_failures(self) -> None:
        for endpoint in self.endpoints:
            endpoint.raise_failure()


class MoePass:
    """One rank's forward and backward pass: inputs, and buffers that the kernels fill."""

    def __init__(
        self, group: VirtualGroup, heap: MoeHeap, case: MoeCase, rank: int, rng: np.random.Generator
    ) -> None:
        self.case, self.rank, self.endpoint = case, rank, group.endpoints[rank]
        self._memory = group.memory
        self._launches: list[tuple[Callable[..., None], list[abi.Moe]]] = []
        tokens, ranks, topk, slots = case.tokens[rank], case.ranks, case.topk, case.slots_per_rank
        self.slot_TK = draw_slots(case, tokens, rng)
        weight_type = np.float64 if case.dtype == "f64" else np.float32
        self.weight_TK = rng.random((tokens, topk)).astype(weight_type)
        self.x_TD = encode(rng.standard_normal((tokens, case.hidden)), case.dtype)
        if case.quantised:
            self.x_TD = rng.integers(0, 256, (tokens, case.hidden), np.uint8)
        self.scales = rng.integers(0, 256, (tokens, case.scale_bytes), np.uint8)
        self.grad_TD = encode(rng.standard_normal((tokens, case.hidden)), case.dtype)
        most = max(1, ranks * heap.capacity * topk)
        received = ranks * heap.capacity
        self.buffers: dict[str, np.ndarray] = {
            "rank_position": np.full((tokens, ranks), -7, np.int32),
            "entry_position": np.full((tokens, topk), -7, np.int32),
            "rank_count": np.zeros(ranks, np.int32),
            "slot_count": np.zeros(ranks * slots, np.int32),
            "recv_count": np.zeros(ranks, np.int32),
            "expanded_row": np.full((received, topk), -7, np.int32),
            "source_token": np.full(received, -7, np.int32),
        }
        apart = rank in case.own_first
        # Rows of each part, and what experts and gradients make of them, by field of `abi.Moe`.
        self.parts: dict[abi.Part, dict[str, np.ndarray]] = {
            part: {
                "tokens_per_slot": np.zeros(slots, np.int32),
                "slot_base": np.zeros((ranks, slots), np.int32),
                "total_rows": np.zeros(1, np.int32),
                "rows": np.full_like(self.x_TD, 7, shape=(most, case.hidden)),
                "row_scales": np.zeros((most, max(1, case.scale_bytes)), np.uint8),
                "row_weight": np.full(most, np.nan, weight_type),
                "y": encode(rng.standard_normal((most, case.hidden)), case.dtype),
                "row_grad": rng.standard_normal(most).astype(weight_type),
                "y_grad": storage((most, case.hidden), case.dtype),
                "row_weight_grad": np.full(most, np.nan, weight_type),
            }
            for part in ((abi.Part.OWN, abi.Part.OTHERS) if apart else (abi.Part.ALL,))
        }
        self.out_TD = storage((tokens, case.hidden), case.dtype)
        # Gradients of x and of weights, from each part.
        self.input_grads = {
            part: (
                storage((tokens, case.hidden), case.dtype),
                np.full((tokens, topk), np.nan, weight_type),
            )
            for part in self.parts
        }
        self._common = moe_sizes(heap, case, tokens) | {
            "group": self.endpoint.group,
            "max_rows": most,
        }

    def part_of(self, source: int) -> abi.Part:
        """The part that holds the rows of a source rank."""
        if abi.Part.ALL in self.parts:
            return abi.Part.ALL
        return abi.Part.OWN if source == self.rank else abi.Part.OTHERS

    def arguments(self, part: abi.Part, names: str, **changes: Any) -> abi.Moe:
        """Of a kernel; arrays become addresses, those that all kernels use are added.

        Args:
            part: That it works on.
            names: Arrays of the part that it takes.
            changes: Further fields.
        """
        arrays = {"slot": self.slot_TK, "weight": self.weight_TK, **self.buffers}
        arrays |= {name: self.parts[part][name] for name in names.split()}
        fields = self._common | arrays | {"part": part} | changes
        return abi.Moe(
            **{
                name: self._memory.address(value) if isinstance(value, np.ndarray) else value
                for name, value in fields.items()
            }
        )

    def prepare(self) -> None:
        """Fix the arguments of all kernels, so that nothing but launches is left to do."""
        row_bytes = self.case.hidden * self.x_TD.itemsize
        rows = "tokens_per_slot slot_base total_rows rows row_scales row_weight"
        inputs = {"x": self.x_TD, "scales": self.scales, "row_bytes": row_bytes}
        gradients = "y row_weight y_grad row_weight_grad"
        end, parts = self.endpoint, list(self.parts)
        forward = [self.arguments(part, rows, **inputs) for part in parts]
        combine = [self.arguments(part, "y row_weight", out=self.out_TD) for part in parts]
        combine_grad = [
            self.arguments(part, gradients, scale_bytes=0, x=self.grad_TD) for part in parts
        ]
        dispatch_grad = [
            self.arguments(part, "y row_grad", out=out, route_grad=route_grad)
            for part, (out, route_grad) in self.input_grads.items()
        ]
        if len(parts) == 1:
            self._launches = [(end.queue_routes, forward), (end.queue_expand, forward)]
            later = [(end.queue_combine, combine)]
            gradient = [(end.queue_combine_grad, combine_grad)]
        else:
            own, others = forward
            self._launches = [
                (end.queue_layout, [others]),
                (end.queue_receive, [own]),
                (end.queue_expand, [own]),
                (end.queue_arrivals, [others]),
                (end.queue_expand, [others]),
            ]
            whole = self.arguments(abi.Part.ALL, "", out=self.out_TD)
            later = [(end.queue_combine_apart, [*combine, whole])]
            gradient = [(end.queue_combine_grad_apart, combine_grad)]
        if self.case.dispatch_only:
            return
        self._launches += later
        if self.case.backward:
            self._launches += gradient
            self._launches += [(end.queue_combine, [one]) for one in dispatch_grad]

    def queue(self) -> None:
        if not self._launches:
            self.prepare()
        for launch, arguments in self._launches:
            launch(*arguments)


def moe_heap(case: MoeCase, capacity: int | None = None) -> MoeHeap:
    row_bytes = case.hidden * storage((1,), case.dtype).itemsize
    return MoeHeap(
        num_ranks=case.ranks,
        slots_per_rank=case.slots_per_rank,
        capacity=max(1, *case.tokens) if capacity is None else capacity,
        topk=case.topk,
        row_bytes=row_bytes,
        scale_bytes=case.scale_bytes,
        partial_bytes=row_bytes,
    )


def moe_sizes(heap: MoeHeap, case: MoeCase, tokens: int) -> dict[str, int]:
    offsets = heap.offsets()
    del offsets["end"]
    return {
        "tokens": tokens,
        "topk": heap.topk,
        "slots_per_rank": heap.slots_per_rank,
        "capacity": heap.capacity,
        "row_bytes": heap.row_bytes,
        "scale_bytes": heap.scale_bytes,
        "row_stride": heap.row_stride,
        "scale_stride": heap.scale_stride,
        "partial_stride": heap.partial_stride,
        "hidden": case.hidden,
        "dtype": DTYPES[case.dtype],
        "weight_words": 2 if case.dtype == "f64" else 1,
        **offsets,
    }


def draw_slots(case: MoeCase, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """[T, K] int32 distinct slots, some routes dropped."""
    slots = case.ranks * case.slots_per_rank
    order = rng.random((tokens, slots))
    if case.hot_rank:
        order[:, : case.slots_per_rank] -= 1  # every token goes to rank 0 first
    slot_TK = np.argsort(order, axis=1)[:, : case.topk].astype(np.int32)
    slot_TK[rng.random(slot_TK.shape) < case.dropped] = -1
    return np.ascontiguousarray(slot_TK)


def run_moe(
    library: abi.EmulatorLibrary,
    case: MoeCase,
    *,
    y_value: np.ndarray | None = None,
    weight: float | None = None,
    memory: Memory | None = None,
) -> list[list[MoePass]]:
    """Queue all iterations of all ranks, run them, and check every output: [iteration][rank].

    Args:
        library: The library to run.
        case: Shapes and schedule.
        y_value: Expert output of every row; random rows by default.
        weight: Weight of every route; random by default.
        memory: That kernels read and write; the host's by default.
    """
    library.configure(seed=case.seed, max_resident_blocks=case.max_resident_blocks)
    rng = np.random.default_rng(case.seed)
    heap = moe_heap(case)
    group = VirtualGroup(
        library,
        heap.offsets()["end"],
        case.ranks,
        blocks=case.blocks,
        threads=case.threads,
        memory=memory,
    )
    passes = [
        [MoePass(group, heap, case, rank, rng) for rank in range(case.ranks)]
        for _ in range(case.iterations)
    ]
    for one in (one for iteration in passes for one in iteration):
        if y_value is not None:
            for arrays in one.parts.values():
                arrays["y"][:] = encode(y_value, case.dtype)
        if weight is not None:
            one.weight_TK[:] = weight
    for one in (one for iteration in passes for one in iteration):
        one.prepare()
    group.memory.settle()
    for rank in rng.permutation(case.ranks):
        for iteration in passes:
            iteration[rank].queue()
    library.synchronize()
    group.raise_failures()
    group.memory.fetch()
    for iteration in passes:
        check_moe(case, heap, iteration)
    return passes


def expected_rows(
    case: MoeCase, passes: list[MoePass], rank: int
) -> list[tuple[int, int, int, int]]:
    """(slot, source rank, token, k) of each row of a rank, in order."""
    rows = []
    for source, one in enumerate(passes):
        for token, k in zip(*np.nonzero(one.slot_TK // case.slots_per_rank == rank)):
            if one.slot_TK[token, k] >= 0:
                rows.append((int(one.slot_TK[token, k]), source, int(token), int(k)))
    return sorted(rows)


def check_moe(case: MoeCase, heap: MoeHeap, passes: list[MoePass]) -> None:
    """Compare everything the ranks computed with the float64 reference."""
    ranks, dtype, hidden = case.ranks, case.dtype, case.hidden
    weight_y = [np.zeros((case.tokens[r], ranks, hidden)) for r in range(ranks)]
    plain_y = [np.zeros_like(part) for part in weight_y]
    magnitude = [np.zeros((case.tokens[r], hidden)) for r in range(ranks)]
    plain_magnitude = [np.zeros_like(part) for part in magnitude]
    weight_grad = [np.zeros((case.tokens[r], case.topk)) for r in range(ranks)]
    for rank, here in enumerate(passes):
        rows = expected_rows(case, passes, rank)
        next_row = dict.fromkeys(here.parts, 0)
        for part, arrays in here.parts.items():
            slots = [slot for slot, source, *_ in rows if here.part_of(source) is part]
            assert arrays["total_rows"][0] == len(slots)
            first = rank * case.slots_per_rank
            per_slot = [slots.count(first + local) for local in range(case.slots_per_rank)]
            assert arrays["tokens_per_slot"].tolist() == per_slot
        pairs = {(source, token) for _, source, token, _ in rows}
        received = [sum(source == s for source, _ in pairs) for s in range(ranks)]
        got = here.buffers["recv_count"].tolist()
        assert got == received, "each (token, rank) pair travels once"
        for _, source, token, k in rows:
            origin, part = passes[source], here.part_of(source)
            row = {name: here.parts[part][name][next_row[part]] for name in ROW_ARRAYS}
            next_row[part] += 1
            np.testing.assert_array_equal(row["rows"], origin.x_TD[token])
            if case.scale_bytes:
                np.testing.assert_array_equal(row["row_scales"], origin.scales[token])
            weight, y = float(origin.weight_TK[token, k]), decode(row["y"], dtype)
            assert row["row_weight"] == weight
            weight_y[source][token, rank] += weight * y
            plain_y[source][token, rank] += y
            magnitude[source][token] += abs(weight * y)
            plain_magnitude[source][token] += abs(y)
            weight_grad[source][token, k] = row["row_grad"]
            if not case.backward or case.dispatch_only:
                continue
            g = decode(origin.grad_TD[token], dtype)
            close(decode(row["y_grad"], dtype), weight * g, abs(weight * g), dtype)
            dot, size = g @ y, np.abs(g) @ np.abs(y)
            assert abs(row["row_weight_grad"] - dot) <= ACCUMULATION[dtype] * size + 1e-30
    for rank, here in enumerate([] if case.dispatch_only else passes):
        check_sum(here.out_TD, weight_y[rank], magnitude[rank], dtype)
        if not case.backward:
            continue
        for part, (x_grad_TD, _) in here.input_grads.items():
            columns = [source for source in range(ranks) if here.part_of(source) is part]
            check_sum(x_grad_TD, plain_y[rank][:, columns], plain_magnitude[rank], dtype)
        got = sum(weight_grad_TK for _, weight_grad_TK in here.input_grads.values())
        np.testing.assert_array_equal(got, weight_grad[rank].astype(got.dtype))


def check_sum(got: np.ndarray, parts_TGD: np.ndarray, magnitude: np.ndarray, dtype: str) -> None:
    """A sum over ranks of partial sums that were each rounded once."""
    total = parts_TGD.sum(axis=1)
    rounded = np.abs(parts_TGD).sum(axis=1) + np.abs(total)
    bound = (
        1.01 * ROUNDING[dtype] * rounded + ACCUMULATION[dtype] * magnitude + 70 * SMALLEST[dtype]
    )
    error = np.abs(decode(got, dtype) - total)
    assert (error <= bound).all(), (
        f"largest excess {np.nanmax(error - bound)}, NaN: {np.isnan(error).any()}"
    )


def close(got: np.ndarray, expected: np.ndarray, magnitude: np.ndarray, dtype: str) -> None:
    bound = 1.01 * ROUNDING[dtype] * magnitude + ACCUMULATION[dtype] * magnitude + SMALLEST[dtype]
    error = np.abs(got - expected)
    assert (error <= bound).all(), (
        f"largest excess {np.nanmax(error - bound)}, NaN: {np.isnan(error).any()}"
    )
