"""Placement by load alone that stays balanced when the load drifts.

A balancer that trusts its profile packs ranks to within a percent and then meets another workload,
where the busiest rank is 20-50 % above the mean. What can be known beforehand is how loads drift,
and that is what is balanced here:

* Regression. If loads are log-normal with the same spread in every workload, and correlate with the
  profiled one by rho in the logarithm, the expected load is load^rho (normalised): hot experts
  cool, cold ones warm up, all together. Ranks are balanced under several rho at once.
* Spread. What rho leaves open is independent between experts, except for a part shared by blocks
  of neighbours (the groups of a group-limited router). Each rank's standard deviation follows. What
  is levelled is mean + 2 deviations, so hot copies, and copies of one block, spread out.

Where blocks share a fifth of the drift this gains 1-2 % of mean/max over EPLB; drift that is
independent between experts cannot be prepared for, and there the two are equal.

Copies go to the experts with the largest mean + 2 deviations a copy, and swaps of slots then
maximise the mean over rho of mean/max. An expert's load splits evenly over its copies, as EPLB and
the runtimes that deal tokens to copies in turn assume.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from semantic_ep.errors import PlacementError, explain
from semantic_ep.plan.baselines.eplb import balanced_packing, separate_copies
from semantic_ep.plan.placement import Placement

_SHARPNESS = 48  # of the p-norm that stands for the maximum over ranks; see _sharpen
_CANDIDATES = 8  # ranks, worst first, that a round of swaps tries before it gives up
_TOLERANCE = 1e-6  # of the mean rank load: smaller gains end the search


@dataclasses.dataclass(frozen=True, kw_only=True)
class DriftModel:
    """How far another workload's load may be from the profiled one.

    Attributes:
        correlations: Values of rho to prepare for, equally likely; 1 is the profile itself.
        block_size: Neighbouring experts whose drift is correlated; None for an eighth of them.
        block_share: Share of the drift's variance that a block has in common.
        deviations: Standard deviations added to the mean. 2 is about the expected maximum of 32
            standard normals, and nothing depends on it sharply: 1 and 3 lose little.
    """

    correlations: tuple[float, ...] = (1.0, 0.99, 0.95, 0.85, 0.75)
    block_size: int | None = None
    block_share: float = 0.2
    deviations: float = 2.0

    def moments(self, load_E: np.ndarray, ep_size: int) -> tuple[np.ndarray, np.ndarray]:
        """([C, E] mean, [C, E] standard deviation) of loads, in units of the mean rank load."""
        log_E = np.log(load_E + 0.5)  # an expert never seen has been seen half a time
        centre, spread = log_E.mean(), log_E.std()
        rho_C = np.array(self.correlations)[:, None]
        mean_CE = np.exp(rho_C * (log_E - centre))
        mean_CE *= ep_size / mean_CE.sum(axis=1, keepdims=True)
        return mean_CE, mean_CE * np.sqrt(np.expm1(spread**2 * (1 - rho_C**2)))


def place_for_load(
    load: np.ndarray,
    *,
    ep_size: int,
    redundant_slots: int = 0,
    drift: DriftModel | None = None,
) -> Placement:
    """Place experts and their copies so that ranks stay level under drift.

    Args:
        load: [L, E] activations of each expert.
        ep_size: EP ranks (G).
        redundant_slots: Slots beyond one an expert, over all ranks. Where they do not divide, some
            ranks keep an empty slot.
        drift: What to prepare for; None for the defaults.

    Raises:
        PlacementError: More slots than every expert on every rank, or fewer than experts.
    """
    load = np.asarray(load, dtype=np.float64)
    experts = load.shape[1]
    if not 0 <= redundant_slots <= experts * (ep_size - 1):
        raise PlacementError(
            explain(
                "redundant slots cannot be filled with one copy of an expert a rank",
                where="plan.redundant_slots (--redundant-slots)",
                got=redundant_slots,
                allowed=f"0..{experts * (ep_size - 1)} for {experts} experts on {ep_size} ranks",
            )
        )
    drift = DriftModel() if drift is None else drift
    rows = [_place_layer(row, ep_size, redundant_slots, drift) for row in load]
    return Placement(physical_to_logical_map=np.stack(rows), num_experts=experts, ep_size=ep_size)


def copies_by_share(weight: np.ndarray, num_slots: int, *, max_copies: int) -> np.ndarray:
    """[E] copies of each expert, each spare slot given where the share of a copy is largest.

    Args:
        weight: [C, E], weight of each expert in each scenario; shares are averaged over scenarios.
        num_slots: Copies in all.
        max_copies: Most copies of one expert.
    """
    copies = np.ones(weight.shape[1], dtype=np.int64)
    mean_weight = weight.mean(axis=0)
    for _ in range(num_slots - len(copies)):
        share = np.where(copies < max_copies, mean_weight / copies, -np.inf)
        copies[share.argmax()] += 1
    return copies


def _place_layer(
    load_E: np.ndarray, ep_size: int, redundant_slots: int, drift: DriftModel
) -> np.ndarray:
    """[G * S] logical expert of each slot, -1 for an empty one."""
    experts = len(load_E)
    mean_CE, deviation_CE = drift.moments(load_E, ep_size)
    copies_E = copies_by_share(
        mean_CE + drift.deviations * deviation_CE, experts + redundant_slots, max_copies=ep_size
    )
    # Slots that divide unevenly are filled up with phantom experts of no load, one copy each.
    phantoms = -int(copies_E.sum()) % ep_size
    copies_E = np.concatenate([copies_E, np.ones(phantoms, dtype=np.int64)])
    mean_CE, deviation_CE = (
        np.pad(table, ((0, 0), (0, phantoms))) / copies_E for table in (mean_CE, deviation_CE)
    )
    expert_of_copy = np.repeat(np.arange(len(copies_E)), copies_E)
    share = mean_CE.mean(axis=0)[expert_of_copy]
    rank, position = balanced_packing(share[None], ep_size)
    slots = np.empty(len(expert_of_copy), dtype=np.int64)
    slots[rank[0] * (len(slots) // ep_size) + position[0]] = expert_of_copy
    slots = separate_copies(slots, mean_CE.mean(axis=0)[slots], num_ranks=ep_size)
    block_size = drift.block_size or -(-experts // 8)
    search = _Search(
        slots=slots.reshape(ep_size, -1),
        mean=mean_CE,
        own_variance=deviation_CE**2 * (1 - drift.block_share),
        block_deviation=deviation_CE * np.sqrt(drift.block_share),
        block=np.arange(len(copies_E)) // block_size,
        deviations=drift.deviations,
    )
    search.run()
    return np.where(search.slots < experts, search.slots, -1).ravel()


def _sharpen(level: np.ndarray) -> np.ndarray:
    """level ** 48 by squaring, many times faster than a general power."""
    eighth = ((level * level) ** 2) ** 2
    sixteenth = eighth * eighth
    return np.asarray(sixteenth * sixteenth * sixteenth)


def _loss(total: np.ndarray) -> np.ndarray:
    """Minus mean/max, mean over scenarios (axis 0), from sums over ranks of sharpened levels."""
    return np.asarray(-(total ** (-1 / _SHARPNESS)).mean(axis=0))


class _Search:
    """Swaps of slots between ranks that lower the p-norm of ranks' mean + deviations.

    C scenarios, G ranks, S slots a rank, E experts, B blocks. A rank's variance is the sum of its
    slots' own variances plus, for each block, the square of the sum of block deviations.
    """

    def __init__(
        self,
        *,
        slots: np.ndarray,
        mean: np.ndarray,
        own_variance: np.ndarray,
        block_deviation: np.ndarray,
        block: np.ndarray,
        deviations: float,
    ) -> None:
        self.slots = slots  # [G, S]
        self._mean, self._own, self._shared = mean, own_variance, block_deviation  # [C, E]
        self._block, self._deviations = block, deviations  # [E]
        ranks, scenarios = len(slots), len(mean)
        self._held = np.zeros((ranks, len(block)), dtype=bool)
        np.put_along_axis(self._held, slots, True, axis=1)
        self._rank_mean = np.empty((scenarios, ranks))
        self._rank_variance = np.empty((scenarios, ranks))
        self._rank_block = np.zeros((scenarios, ranks, int(block.max()) + 1))
        for rank in range(ranks):
            self._recount(rank)

    def run(self) -> None:
        """Swap until no swap with one of the worst ranks helps."""
        while self._improve():
            pass

    def _recount(self, rank: int) -> None:
        held = self.slots[rank]
        self._rank_mean[:, rank] = self._mean[:, held].sum(axis=1)
        onehot = self._block[held][:, None] == np.arange(self._rank_block.shape[2])
        self._rank_block[:, rank] = self._shared[:, held] @ onehot
        self._rank_variance[:, rank] = self._own[:, held].sum(axis=1) + (
            self._rank_block[:, rank] ** 2
        ).sum(axis=1)

    def _level(self, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
        return np.asarray(mean + self._deviations * np.sqrt(np.maximum(variance, 0.0)))

    def _improve(self) -> bool:
        powers = _sharpen(self._level(self._rank_mean, self._rank_variance))  # [C, G]
        total = powers.sum(axis=1)
        current = _loss(total)
        weight = (powers * (total ** (-1 / _SHARPNESS - 1))[:, None]).sum(axis=0)
        for rank in np.argsort(-weight, kind="stable")[:_CANDIDATES]:
            cost = self._costs_of_swaps(int(rank), powers, total)  # [S, G * S]
            slot, partner = np.unravel_index(int(cost.argmin()), cost.shape)
            if cost[slot, partner] < current - _TOLERANCE:
                other, position = divmod(int(partner), self.slots.shape[1])
                self._swap(int(rank), int(slot), other, position)
                return True
        return False

    def _swap(self, rank: int, slot: int, other: int, position: int) -> None:
        leaving, coming = self.slots[rank, slot], self.slots[other, position]
        self.slots[rank, slot], self.slots[other, position] = coming, leaving
        self._held[rank, [leaving, coming]] = False, True
        self._held[other, [coming, leaving]] = False, True
        self._recount(rank)
        self._recount(other)

    def _costs_of_swaps(self, rank: int, powers: np.ndarray, total: np.ndarray) -> np.ndarray:
        """[S, G * S] objective after swapping a slot of `rank` with any slot; inf if illegal."""
        room = self.slots.shape[1]
        mine, theirs = self.slots[rank], self.slots.ravel()
        other = np.repeat(np.arange(len(self.slots)), room)
        change = self._mean[:, mine, None] - self._mean[:, None, theirs]
        mean_here = self._rank_mean[:, rank, None, None] - change
        mean_there = self._rank_mean[:, None, other] + change
        variance_here, variance_there = self._variances_of_swaps(rank, mine, theirs, other)
        here = _sharpen(self._level(mean_here, variance_here))
        there = _sharpen(self._level(mean_there, variance_there))
        rest = (total - powers[:, rank])[:, None, None] - powers[:, None, other]
        cost = _loss(np.maximum(rest, 0.0) + here + there)
        legal = (
            (other != rank) & ~self._held[rank, theirs] & ~self._held[other[None], mine[:, None]]
        )
        return np.where(legal, cost, np.inf)

    def _variances_of_swaps(
        self, rank: int, mine: np.ndarray, theirs: np.ndarray, other: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """[C, S, G * S] variance of `rank`, and of the other rank, after each swap."""
        own = self._own[:, mine, None] - self._own[:, None, theirs]
        out, into = self._shared[:, mine, None], self._shared[:, None, theirs]
        mine_block, their_block = self._block[mine], self._block[theirs]
        same = mine_block[:, None] == their_block[None]
        here = self._rank_block[:, rank]
        delta_here = _squares(
            same, here[:, mine_block, None], -out, here[:, None, their_block], into
        )
        there_mine = self._rank_block[:, other[None], mine_block[:, None]]
        there_theirs = self._rank_block[:, other, their_block][:, None]
        delta_there = _squares(same, there_mine, out, there_theirs, -into)
        return (
            self._rank_variance[:, rank, None, None] - own + delta_here,
            self._rank_variance[:, None, other] + own + delta_there,
        )


def _squares(
    same: np.ndarray, sum_a: np.ndarray, change_a: np.ndarray, sum_b: np.ndarray,
    change_b: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Change of the sum of squared block sums when blocks a and b, perhaps the same, change."""
    apart = change_a * (2 * sum_a + change_a) + change_b * (2 * sum_b + change_b)
    together = (change_a + change_b) * (2 * sum_a + change_a + change_b)
    return np.asarray(np.where(same, together, apart))
