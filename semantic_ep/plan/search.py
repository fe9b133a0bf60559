"""Local search over swaps of two experts, under balanced homes and de-duplicated copies.

The objective of a placement, for sampled tokens with expected activations on every expert:

    mean local activations of homes in equal slices / K  -  mean distinct ranks a token touches / K
    -  a penalty on expert load beyond a cap.

Homes in equal slices are a transportation problem; its dual prices each rank in each batch, and
under given prices a swap's effect is a sum over tokens of a maximum. A step scores the swaps of a
block of experts between two ranks under the current prices, draws one at an annealed temperature,
prices again, and keeps the swap by the Metropolis rule on the true change. Without the second
look, swaps that pay only until prices react would be taken.
"""

from __future__ import annotations

import time

import numpy as np

_BLOCK = 8
_LOAD_PENALTY = 2.0


class SwapSearch:
    """State of the search on one layer: N = batches x m tokens, E experts, G ranks."""

    def __init__(
        self,
        expected_NE: np.ndarray,
        active_NE: np.ndarray | None,
        load_E: np.ndarray,
        *,
        ep_size: int,
        top_k: int,
        batches: int,
        load_cap: float,
        pairs_EE: np.ndarray | None = None,
        router_groups: int = 1,
    ) -> None:
        """Take the sample.

        Args:
            expected_NE: Expected activations, tokens of a batch adjacent, N divisible by
                `batches`.
            active_NE: Whether the token does activate the expert; None when only counts are known.
            load_E: Activations of each expert.
            ep_size: EP ranks (G), which divides E.
            top_k: Experts a token activates (K).
            batches: Batches that are divided in equal slices each.
            load_cap: Expert load a rank, over the mean, from which the penalty counts.
            pairs_EE: Without `active_NE`: distinct ranks that a token saves when two experts
                share a rank (see `saving_by_pairs`).
            router_groups: Blocks of neighbouring ranks that no expert leaves; divides G.
        """
        assert (active_NE is None) != (pairs_EE is None)
        self.ranks, self.top_k, self.load_cap = ep_size, top_k, load_cap
        self.blocks = router_groups
        tokens, experts = expected_NE.shape
        self.shape = (batches, tokens // batches)
        self.gain = np.ascontiguousarray(expected_NE.T, dtype=np.float32) / np.float32(top_k)
        self.active = None
        if active_NE is not None:
            self.active = np.ascontiguousarray(active_NE.T).astype(np.int8)
        self.pairs = np.zeros((experts, experts)) if pairs_EE is None else pairs_EE / top_k
        self.load = load_E / max(float(load_E.sum()), 1e-12) * ep_size
        self.start(np.arange(experts) * ep_size // experts)

    def start(self, rank_E: np.ndarray) -> float:
        """Stand at a placement; returns its objective."""
        self.rank = np.array(rank_E, dtype=np.int64)
        onto = [self.rank == rank for rank in range(self.ranks)]
        self.score = np.stack([self.gain[mine].sum(axis=0) for mine in onto])
        self.rank_load = np.array([self.load[mine].sum() for mine in onto])
        if self.active is not None:
            self.touches = np.stack([self.active[mine].sum(axis=0, dtype=np.int8) for mine in onto])
        self.price = np.zeros((self.ranks, self.shape[0]), dtype=np.float32)
        self._reprice(sweeps=6)
        self.value = self._objective()
        return self.value

    def run(
        self,
        rng: np.random.Generator,
        *,
        steps: int,
        temperatures: tuple[float, float] = (1e-3, 5e-5),
        deadline: float | None = None,
    ) -> tuple[np.ndarray, float]:
        """Search from where it stands; returns the best [E] ranks seen and their objective."""
        best, best_value = self.rank.copy(), self.value
        hot, cold = temperatures
        for step in range(steps):
            temperature = hot * (cold / hot) ** (step / steps)
            if self._step(rng, temperature) and self.value > best_value:
                best, best_value = self.rank.copy(), self.value
            if deadline is not None and time.monotonic() > deadline:
                break
        return best, best_value

    def _step(self, rng: np.random.Generator, temperature: float) -> bool:
        block = self.ranks // self.blocks
        here, there = rng.choice(block, 2, replace=False)
        if self.blocks > 1:
            here, there = block * rng.integers(self.blocks) + np.array([here, there])
        ours = _some(rng, np.flatnonzero(self.rank == here))
        theirs = _some(rng, np.flatnonzero(self.rank == there))
        change = self._changes(here, there, ours, theirs)
        weight = np.append(change.ravel(), 0.0) / temperature
        weight = np.cumsum(np.exp(weight - weight.max()))
        drawn = int(np.searchsorted(weight, rng.random() * weight[-1]))
        if drawn >= change.size:
            return False
        pair = int(ours[drawn // len(theirs)]), int(theirs[drawn % len(theirs)])
        before, price = self.value, self.price.copy()
        self._swap(*pair)
        self._reprice(sweeps=1)
        self.value = self._objective()
        if rng.random() < np.exp(min((self.value - before) / temperature, 0.0)):
            return True
        self._swap(*pair)
        self.price, self.value = price, before
        return False

    def _changes(self, here: int, there: int, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        """[a, b] change of the objective for each swap, under the current prices."""
        price = np.repeat(self.price, self.shape[1], axis=1)
        net_here, net_there = (self.score[rank] - price[rank] for rank in (here, there))
        rest = [rank for rank in range(self.ranks) if rank not in (here, there)]
        others = (self.score[rest] - price[rest]).max(axis=0, initial=-np.inf)
        difference = self.gain[theirs][None] - self.gain[ours][:, None]
        after = np.maximum(net_here + difference, net_there - difference)
        now = np.maximum(np.maximum(net_here, net_there), others).mean()
        change = np.maximum(after, others, out=after).mean(axis=2) - now
        change = change - self._distinct_change(here, there, ours, theirs)
        moved = self.load[theirs][None] - self.load[ours][:, None]
        over_here, over_there = self.rank_load[here], self.rank_load[there]
        excess = (
            self._excess(over_here + moved)
            + self._excess(over_there - moved)
            - self._excess(over_here)
            - self._excess(over_there)
        )
        return np.asarray(change - _LOAD_PENALTY / self.ranks * excess)

    def _distinct_change(
        self, here: int, there: int, ours: np.ndarray, theirs: np.ndarray
    ) -> np.ndarray:
        """[a, b] change of mean distinct ranks / K for each swap."""
        if self.active is None:
            mine, other = self.rank == here, self.rank == there
            lost = self.pairs[ours][:, mine].sum(1)[:, None] + self.pairs[theirs][:, other].sum(1)
            won = self.pairs[ours][:, other].sum(1)[:, None] + self.pairs[theirs][:, mine].sum(1)
            return np.asarray(lost - won + 2 * self.pairs[np.ix_(ours, theirs)])
        difference = self.active[theirs][None] - self.active[ours][:, None]
        touched = ((self.touches[here] + difference) > 0).mean(axis=2)
        touched += ((self.touches[there] - difference) > 0).mean(axis=2)
        now = (self.touches[here] > 0).mean() + (self.touches[there] > 0).mean()
        return np.asarray((touched - now) / self.top_k)

    def _swap(self, one: int, other: int) -> None:
        here, there = self.rank[one], self.rank[other]
        difference = self.gain[other] - self.gain[one]
        self.score[here] += difference
        self.score[there] -= difference
        if self.active is not None:
            touched = self.active[other] - self.active[one]
            self.touches[here] += touched
            self.touches[there] -= touched
        moved = self.load[other] - self.load[one]
        self.rank_load[here] += moved
        self.rank_load[there] -= moved
        self.rank[one], self.rank[other] = there, here

    def _reprice(self, *, sweeps: int) -> None:
        """Coordinate ascent on the dual: each rank's price lets in its share of each batch."""
        batches, width = self.shape
        score = self.score.reshape(self.ranks, batches, width)
        cut = width - max(width // self.ranks, 1)
        for _ in range(sweeps):
            for rank in range(self.ranks):
                rest = np.arange(self.ranks) != rank
                others = (score[rest] - self.price[rest][:, :, None]).max(axis=0, initial=-np.inf)
                part = np.partition(score[rank] - others, [cut - 1, cut], axis=1)
                self.price[rank] = (part[:, cut - 1] + part[:, cut]) / 2

    def _objective(self) -> float:
        batches, width = self.shape
        net = self.score.reshape(self.ranks, batches, width) - self.price[:, :, None]
        local = float(net.max(axis=0).mean() + self.price.mean(axis=1).sum() / self.ranks)
        if self.active is None:
            same = self.rank[:, None] == self.rank
            distinct = 1.0 - float(self.pairs[same].sum() - np.trace(self.pairs)) / 2
        else:
            distinct = float((self.touches > 0).mean(axis=1).sum()) / self.top_k
        overload = float(self._excess(self.rank_load).sum())
        return local - distinct - _LOAD_PENALTY / self.ranks * overload

    def _excess(self, load: np.ndarray) -> np.ndarray:
        return np.maximum(load - self.load_cap, 0.0)


def saving_by_pairs(
    coactivation_EE: np.ndarray, *, tokens: float, top_k: int, ep_size: int
) -> np.ndarray:
    """[E, E], distinct ranks a token saves when two experts share a rank, from pair counts alone.

    A rank that holds n of a token's experts saves n - 1 copies; pairs would count n (n - 1) / 2.
    The ratio of the two, over random placements, scales the pairs.
    """
    experts = len(coactivation_EE)
    slots = experts // ep_size
    untouched = np.prod((experts - slots - np.arange(top_k)) / (experts - np.arange(top_k)))
    saved = top_k - ep_size * (1 - max(float(untouched), 0.0))
    pairs = top_k * (top_k - 1) / 2 * (slots - 1) / max(experts - 1, 1)
    scale = saved / pairs if pairs > 0 else 0.0
    return np.asarray(coactivation_EE * (scale / max(tokens, 1e-12)))


def _some(rng: np.random.Generator, experts: np.ndarray) -> np.ndarray:
    return experts if len(experts) <= _BLOCK else rng.choice(experts, _BLOCK, replace=False)
