"""Expert load that placements may plan for, so that other requests stay below what is allowed."""

from __future__ import annotations

import numpy as np

from semantic_ep.observe.profile import RoutingProfile

# Sequences that half a profile must hold to tell how loads vary.
_MIN_HALF = 16
# A cap above what is allowed on average is for layers where others leave room.
_MAX_ABOVE = 0.1
_LEAST_CAP = 1.02


class LoadBudget:
    """Spends an allowed load, mean over layers, on the layers of a placement one by one.

    A layer is as slow as its fullest rank, so time goes with the mean over layers of the load of
    the fullest rank. Layers that stay below their cap leave room for later ones.

    Loads grow from the profile to other requests. How much shows between one half of the profile's
    sequences and the other, on the groups of experts placed so far; on random groups before any
    is. Halves differ by about twice as much as the whole differs from other requests. Without
    sequences, less than half of what is allowed above the mean is used.
    """

    def __init__(self, profile: RoutingProfile, *, ep_size: int, allowed: float, seed: int) -> None:
        """Take the profile.

        Args:
            profile: Counts planned on.
            ep_size: EP ranks (G).
            allowed: Mean over layers of the load of the fullest rank, over the mean of ranks, to
                expect on other requests.
            seed: Seed of halves and groups.
        """
        self.ep_size, self.allowed = ep_size, allowed
        rng = np.random.default_rng(seed)
        sequences = rng.permutation(profile.sequence_load, axis=0)
        half = len(sequences) // 2
        self._load_LE = profile.load
        self._halves: tuple[np.ndarray, ...] = ()
        self._growth: list[float] = []
        self._expected: list[float] = []
        if half < _MIN_HALF:
            self._first_growth = allowed / (1 + 0.4 * (allowed - 1)) - 1
            return
        parts = (sequences[:half], sequences[half:])
        self._halves = tuple(part.sum(axis=0, dtype=np.float64) for part in parts)
        layers, experts = profile.load.shape
        random = np.arange(experts) * ep_size // experts
        self._first_growth = float(
            np.mean([self._grown(layer, rng.permutation(random)) for layer in range(layers)])
        )

    def cap(self) -> float:
        """Load of the fullest rank, over the mean, to plan the next layer for."""
        growth = float(np.mean(self._growth)) if self._growth else self._first_growth
        spent = len(self._expected)
        left = self.allowed * (spent + 1) - float(np.sum(self._expected))
        next_load = min(left, self.allowed + _MAX_ABOVE)
        return max(next_load / (1 + growth), _LEAST_CAP)

    def spend(self, layer: int, rank_E: np.ndarray) -> None:
        """Account for a layer that has been placed.

        Args:
            layer: The layer.
            rank_E: [E] rank of each expert.
        """
        growth = self._grown(layer, rank_E) if self._halves else self._first_growth
        load_G = np.bincount(rank_E, weights=self._load_LE[layer], minlength=self.ep_size)
        fullest = float(load_G.max() / max(load_G.mean(), 1e-12))
        self._growth.append(growth)
        self._expected.append(fullest * (1 + growth))

    def _grown(self, layer: int, rank_E: np.ndarray) -> float:
        """Growth of the fullest rank to expect, from that of the rank that grows most."""
        shares = []
        for load_LE in self._halves:
            load_G = np.bincount(rank_E, weights=load_LE[layer], minlength=self.ep_size)
            shares.append(load_G / max(float(load_G.sum()), 1e-12))
        one, other = (np.maximum(share, 1e-12) for share in shares)
        most = ((one / other).max() + (other / one).max()) / 2 - 1
        # Half for halves; and the rank that grows most is not always the fullest.
        return float(most / 3)
