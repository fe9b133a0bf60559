"""Counters of what a dispatcher sends, and timers: exact, and cheap enough to be always on."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor


# Routes of a group of one rank are counted by slot when this many are waiting: one by one, small
# passes would spend more time on counting than on what else surrounds their experts.
_ROUTES_TOGETHER = 2048


class DispatchStats:
    """What one rank sent and computed, by layer, since the last `reset`.

    Rows and bytes are counted by destination rank, the rank itself included: what crosses a link
    is the sum over the other ranks. All counters are int64.

    Attributes:
        rank: This rank's index in the EP group.
        tokens: [L], tokens dispatched that had at least one route.
        activations: [L, G], routes of this rank's tokens by the rank that computes them.
        rows_dispatch: [L, G], rows sent by `dispatch`.
        rows_combine: [L, G], rows sent back by `combine`.
        bytes_dispatch: [L, G], payload of those rows (hidden states only).
        bytes_combine: [L, G], likewise.
        bytes_metadata: [L, G], everything else that was sent: counts, slots, weights, padding.
    """

    _ARRAYS = (
        "tokens",
        "activations",
        "rows_dispatch",
        "rows_combine",
        "bytes_dispatch",
        "bytes_combine",
        "bytes_metadata",
    )

    def __init__(self, *, num_layers: int, ep_size: int, slots_per_rank: int, rank: int) -> None:
        self.rank = rank
        self._shape = (num_layers, ep_size)
        self._slots_per_rank = slots_per_rank
        self.reset()

    def reset(self) -> None:
        """Set every counter to zero."""
        for name in self._ARRAYS:
            shape = self._shape[:1] if name == "tokens" else self._shape
            setattr(self, name, np.zeros(shape, dtype=np.int64))
        self._slot_activations: list[Tensor | None] = [None] * self._shape[0]
        self._uncounted: list[list[Tensor]] = [[] for _ in range(self._shape[0])]
        self._num_uncounted = [0] * self._shape[0]

    @property
    def slot_activations(self) -> np.ndarray:
        """[L, S] int64, rows that each local slot computed. Waits for the device."""
        for layer in range(self._shape[0]):
            self._count_waiting(layer)
        empty = np.zeros(self._slots_per_rank, dtype=np.int64)
        rows = (empty if t is None else t.cpu().numpy() for t in self._slot_activations)
        return np.stack(list(rows))

    def snapshot(self) -> dict[str, np.ndarray]:
        """Copies of all counters by name, `slot_activations` included. Waits for the device."""
        arrays = {name: getattr(self, name).copy() for name in self._ARRAYS}
        return {**arrays, "slot_activations": self.slot_activations}

    def metrics(self) -> dict[str, float]:
        """What this rank has sent since the reset, under the tracker's names; bytes to others."""
        tokens, activations = self.tokens.sum(), self.activations.sum()
        rows = self.rows_dispatch.sum() - self.rows_dispatch[:, self.rank].sum()
        metrics = {
            "a2a/tokens": float(tokens),
            "a2a/local_activation_rate": float(
                self.activations[:, self.rank].sum() / max(activations, 1)
            ),
            "a2a/remote_copies": float(rows / max(tokens, 1)),
        }
        for name in ("bytes_dispatch", "bytes_combine", "bytes_metadata"):
            sent = getattr(self, name)
            metrics[f"a2a/{name}"] = float(sent.sum() - sent[:, self.rank].sum())
        return metrics

    def record_dispatch(
        self,
        layer: int,
        *,
        tokens: int,
        activations: Sequence[int],
        rows: Sequence[int],
        row_bytes: int,
        metadata_bytes: Sequence[int],
        tokens_per_slot: Tensor,
    ) -> None:
        """Add one `dispatch`; lists are by destination rank."""
        self.tokens[layer] += tokens
        self.activations[layer] += activations
        self.rows_dispatch[layer] += rows
        self.bytes_dispatch[layer] += np.asarray(rows) * row_bytes
        self.bytes_metadata[layer] += metadata_bytes
        self.record_slots(layer, tokens_per_slot)

    def record_alone(self, layer: int, slot_TK: Tensor, *, row_bytes: int) -> None:
        """Add one pass of a group of one rank, which sends every row to itself and back.

        The slots must keep their values.
        """
        tokens, activations = len(slot_TK), slot_TK.numel()
        # Elements, not rows: numpy takes longer for a list than a small layer does.
        self.tokens[layer] += tokens
        self.activations[layer, 0] += activations
        self.rows_dispatch[layer, 0] += tokens
        self.rows_combine[layer, 0] += tokens
        self.bytes_dispatch[layer, 0] += tokens * row_bytes
        self.bytes_combine[layer, 0] += tokens * row_bytes
        self._uncounted[layer].append(slot_TK)
        self._num_uncounted[layer] += activations
        if self._num_uncounted[layer] >= _ROUTES_TOGETHER:
            self._count_waiting(layer)

    def _count_waiting(self, layer: int) -> None:
        import torch

        if not self._uncounted[layer]:
            return
        with torch.inference_mode():  # As where these are from: their sums are changed in place.
            slots = torch.cat([slot_TK.flatten() for slot_TK in self._uncounted[layer]])
            self._uncounted[layer], self._num_uncounted[layer] = [], 0
            self.record_slots(layer, torch.bincount(slots, minlength=self._slots_per_rank))

    def record_slots(self, layer: int, tokens_per_slot: Tensor) -> None:
        """Add rows of local slots; `record_dispatch` does, but for rows that come later."""
        # Stays on the device: a copy to the host for every layer would stall a GPU.
        total = self._slot_activations[layer]
        if total is None:
            self._slot_activations[layer] = tokens_per_slot.clone()
        else:
            total.add_(tokens_per_slot)

    def record_combine(self, layer: int, *, rows: Sequence[int], row_bytes: int) -> None:
        """Add one `combine`; rows are by destination rank, the tokens' home."""
        self.rows_combine[layer] += rows
        self.bytes_combine[layer] += np.asarray(rows) * row_bytes


class PhaseTimer:
    """Seconds spent in named phases; on a GPU by events, which do not stall it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forget all phases."""
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`."""
        if self.device.type == "cuda":
            import torch

            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Seconds by phase since the last reset. Waits for the device."""
        for name, begin, end in self._events:
            end.synchronize()
            self._seconds[name] += begin.elapsed_time(end) / 1e3
        self._events.clear()
        return dict(self._seconds)
