"""Local-first overlap: when experts start on this rank's own rows while the others travel.

Split in two, the experts read their weights twice. This costs nothing where both halves are bound
by arithmetic: an expert of P weights of b bytes takes 2 P r / F seconds for r rows at F FLOP/s,
and P b / B to read at B bytes/s, so the weights are hidden from

    r = (F / B) * b / 2   rows an expert

on: about 300 on an H100 in bfloat16, so in prefill and training rather than in decoding. F and B
are measured, once a process, and r is rounded up to a power of two so that reruns decide alike.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

OverlapMode = Literal["auto", "on", "off"]

# Large enough to be bound by arithmetic and by memory (beyond any cache), small enough to be quick,
# and to fit beside a model.
_MATMUL_SIDE = {"cpu": 512, "cuda": 4096}
_MATRIX_BYTES = {"cpu": 1 << 26, "cuda": 1 << 28}
_REPEATS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceRates:
    """What one device reaches, in one dtype.

    Attributes:
        flops: FLOP/s (F) of a square matrix product.
        bytes_per_second: B, reading a matrix for its product with a vector.
        element_bytes: b.
    """

    flops: float
    bytes_per_second: float
    element_bytes: int

    @property
    def rows_per_expert(self) -> int:
        """r of the formula, rounded up to a power of two."""
        rows = self.flops / self.bytes_per_second * self.element_bytes / 2
        return 1 << max(0, round(rows) - 1).bit_length()


def splits(
    mode: OverlapMode,
    *,
    own_rows: int,
    other_rows: int,
    num_slots: int,
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    """Whether to compute own rows while the others travel; "auto" measures the device, once.

    Args:
        mode: From the configuration: "auto" decides by the formula, "on" and "off" alike always.
        own_rows: Rows of this rank's own tokens.
        other_rows: Rows of other ranks' tokens, a lower bound or an estimate.
        num_slots: Slots that share them (S).
        device: Of the experts.
        dtype: Of their weights.
    """
    if mode != "auto":
        return mode == "on"
    rows = min(own_rows, other_rows) // num_slots
    # Decoding has less than a row an expert: nothing to measure for.
    return rows > 0 and rows >= device_rates(device, dtype).rows_per_expert


@functools.cache
def device_rates(device: torch.device, dtype: torch.dtype) -> DeviceRates:
    """Measure a device; some 50 ms on a CPU core, fewer on a GPU."""
    import torch

    side = _MATMUL_SIDE.get(device.type, _MATMUL_SIDE["cpu"])
    matrix_bytes = _MATRIX_BYTES.get(device.type, _MATRIX_BYTES["cpu"])
    with torch.inference_mode():
        square = torch.ones(side, side, dtype=dtype, device=device)
        columns = matrix_bytes // (side * dtype.itemsize)
        matrix = torch.ones(columns, side, dtype=dtype, device=device)
        product = _fastest(lambda: torch.mm(square, square), device)
        reading = _fastest(lambda: torch.mv(matrix, square[0]), device)
    rates = DeviceRates(
        flops=2 * side**3 / product,
        bytes_per_second=matrix_bytes / reading,
        element_bytes=dtype.itemsize,
    )
    logger.info("local-first overlap on %s: %s", device, describe(rates))
    return rates


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some runs after the first."""
    import torch

    seconds = []
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def describe(rates: DeviceRates) -> str:
    """The decision in words."""
    return (
        f"from {rates.rows_per_expert} rows an expert on, both of this rank's tokens and of "
        f"others' (measured {rates.flops / 1e9:,.0f} GFLOP/s, "
        f"{rates.bytes_per_second / 1e9:,.1f} GB/s, {8 * rates.element_bytes}-bit weights)"
    )
