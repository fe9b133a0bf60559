"""Token-expert counts of one layer within a bound on memory."""

from __future__ import annotations

import numpy as np


class TokenExpertTable:
    """Counts of (token id, expert) cells: dense where that fits the bound, else the largest ones.

    Sparse cells take 16 bytes; those that arrived since the last tidying are held apart and may
    take a quarter of the bound.
    """

    def __init__(self, num_cells: int, max_bytes: int) -> None:
        self.dropped = 0.0
        self._dense = np.zeros(num_cells) if num_cells * 8 <= max_bytes else None
        self._capacity = max_bytes * 3 // 4 // 16
        self._max_pending = max_bytes // 4 // 16
        self._cells: np.ndarray = np.zeros(0, np.int64)
        self._counts: np.ndarray = np.zeros(0)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_pending = 0

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        if self._dense is not None:
            return self._dense.nbytes
        return 16 * (len(self._cells) + self._num_pending)

    def add(self, cells: np.ndarray, weight: float) -> None:
        """Add `weight` to each cell, once for each time it is named."""
        if self._dense is not None:
            np.add.at(self._dense, cells, weight)
            return
        unique, counts = np.unique(cells, return_counts=True)
        self.add_counts(unique, weight * counts)

    def add_counts(self, cells: np.ndarray, counts: np.ndarray) -> None:
        """Add counts to distinct cells."""
        if self._dense is not None:
            self._dense[cells] += counts
            return
        self._pending.append((cells, counts))
        self._num_pending += len(cells)
        if self._num_pending > self._max_pending:
            self._tidy()

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Cells in rising order, and their counts."""
        if self._dense is not None:
            cells = np.flatnonzero(self._dense)
            return cells, self._dense[cells]
        self._tidy()
        return self._cells, self._counts

    def scale(self, factor: float) -> None:
        """Multiply all counts."""
        self.dropped *= factor
        if self._dense is not None:
            self._dense *= factor
            return
        self._tidy()
        self._counts *= factor

    def _tidy(self) -> None:
        if not self._pending:
            return
        cells, counts = (np.concatenate(arrays) for arrays in zip(*self._pending, strict=True))
        self._pending, self._num_pending = [], 0
        cells, inverse = np.unique(cells, return_inverse=True)
        counts = np.bincount(inverse, weights=counts, minlength=len(cells))
        # The cells held are in order already: only those that arrived are sorted.
        place = np.searchsorted(self._cells, cells)
        held = np.zeros(len(cells), bool)
        inside = place < len(self._cells)
        held[inside] = self._cells[place[inside]] == cells[inside]
        self._counts[place[held]] += counts[held]
        self._cells = np.insert(self._cells, place[~held], cells[~held])
        self._counts = np.insert(self._counts, place[~held], counts[~held])
        if len(self._cells) > self._capacity:
            # Making room for an eighth at once keeps the cost of selection rare.
            keep = max(self._capacity * 7 // 8, 1)
            largest = np.argpartition(self._counts, -keep)[-keep:]
            largest.sort()
            self.dropped += float(self._counts.sum() - self._counts[largest].sum())
            self._cells, self._counts = self._cells[largest], self._counts[largest]
