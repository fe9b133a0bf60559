"""Spare slots: second copies of experts, where they save most traffic and level most load.

A copy on rank r serves the tokens whose home is r, and some of those of ranks without one: the
runtimes spread ranks over copies (`cost.nearest_copy`). At home it saves the remote rows that have
no other reason, since a token still needs the other rank if another of its experts is only there;
elsewhere it can cost rows, because an expert is now served apart from those it is used with. Both
are counted. Slots are filled one at a time with the copy of largest marginal gain, so a later copy
counts on the earlier ones. `semantic_ep.plan.balance` is the method for load alone.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import sparse

from semantic_ep.errors import PlacementError, explain
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.policies import PlacementPolicy
from semantic_ep.plan.schedule import rank_shares
from semantic_ep.topology import Topology

# Shares of tokens that run where most of their experts are. Whole requests go by all their tokens
# and all layers at once: on real traces, half models them better than all or none.
TOKENS_SCHEDULED = 1.0
REQUESTS_SCHEDULED = 0.5

# Probabilities stop short of 1, so that a factor can be divided out of a product again.
_ALMOST_ONE = 1 - 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithReplicas:
    """A `PlacementPolicy`: another policy's placement, and copies in spare slots.

    Attributes:
        policy: Places one copy of each expert.
        slots_per_rank: Spare slots a rank has in each layer.
        scheduled: See `add_replicas`.
    """

    policy: PlacementPolicy
    slots_per_rank: int
    scheduled: float = TOKENS_SCHEDULED

    @property
    def name(self) -> str:
        """Name in tables."""
        return f"{self.policy.name}+replicas"

    def place(
        self,
        profile: RoutingProfile,
        *,
        ep_size: int,
        seed: int = 0,
        time_limit: float | None = None,
        topology: Topology | None = None,
    ) -> Placement:
        """See `PlacementPolicy.place`."""
        single = self.policy.place(
            profile, ep_size=ep_size, seed=seed, time_limit=time_limit, topology=topology
        )
        return add_replicas(
            single,
            profile,
            slots_per_rank=self.slots_per_rank,
            topology=topology,
            scheduled=self.scheduled,
        )


def add_replicas(
    placement: Placement,
    profile: RoutingProfile,
    *,
    slots_per_rank: int,
    topology: Topology | None = None,
    scheduled: float = TOKENS_SCHEDULED,
    load_weight: float = 0.1,
) -> Placement:
    """Fill spare slots on every rank with copies of experts that are elsewhere.

    Args:
        placement: One copy of each expert; ranks may hold different numbers of experts.
        profile: Routing counts to plan on.
        slots_per_rank: Spare slots a rank gets in each layer.
        topology: Nodes of the ranks; a copy on the home's node is preferred to a farther one.
        scheduled: Share of each token id's occurrences that run on the rank with most of its
            expected activations; all ranks get the same mix of the others. `TOKENS_SCHEDULED`,
            `REQUESTS_SCHEDULED`, or 0 without a schedule.
        load_weight: What one activation less on the busiest rank is worth, in rows that a rank
            sends. 0 looks at traffic alone; on real traces, 0.1 keeps half of what that saves and
            levels most of what 1 does.

    Returns:
        The placement with `slots_per_rank` more slots a rank, all of them filled.

    Raises:
        PlacementError: There are replicas already, or more slots than experts left to copy.
    """
    experts, ranks = placement.num_experts, placement.ep_size
    if placement.has_replicas or not 0 <= slots_per_rank <= experts - placement.slots_per_rank:
        raise PlacementError(
            explain(
                "spare slots must fit experts that a rank does not hold yet, and start from "
                "single copies",
                where="plan.redundant_slots (--redundant-slots)",
                got=f"{slots_per_rank} a rank, {placement.slots_per_rank} of {experts} held"
                + (", replicas present" if placement.has_replicas else ""),
                allowed=f"0..{experts - placement.slots_per_rank} a rank",
            )
        )
    nodes = np.zeros(ranks, dtype=np.int64) if topology is None else topology.nodes
    rows = []
    for layer in range(placement.num_layers):
        home_traffic = _HomeTraffic.of_layer(profile, placement, layer, scheduled=scheduled)
        copies = _Copies(home_traffic, placement.expert_on_rank[layer], nodes)
        chosen = _fill_slots(copies, slots_per_rank, load_weight)
        own = placement.physical_to_logical_map[layer].reshape(ranks, -1)
        rows.append(np.concatenate([own, chosen], axis=1).ravel())
    return Placement(physical_to_logical_map=np.stack(rows), num_experts=experts, ep_size=ranks)


def serving_ranks(held_EG: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """[G, E] int64, rank that serves each expert for tokens of each home rank.

    The rule of `cost.nearest_copy`: the home rank, else its node, else any; among equals the home
    rank's number picks.
    """
    experts, ranks = held_EG.shape
    serving = np.empty((ranks, experts), dtype=np.int64)
    for home in range(ranks):
        near = held_EG & (nodes == nodes[home])[None, :]
        eligible = np.where(near.any(axis=1)[:, None], near, held_EG)
        wanted = home % eligible.sum(axis=1)
        serving[home] = (np.cumsum(eligible, axis=1) > wanted[:, None]).argmax(axis=1)
        serving[home, held_EG[:, home]] = home
    return serving


class _HomeTraffic:
    """One layer's activations, split by home rank.

    For each home rank a sparse [rows, E] table of activations and the occurrences of each row: the
    token ids at home there, and a G-th of what no schedule sends anywhere.
    """

    def __init__(self, tables: list[sparse.csr_array], weights: list[np.ndarray]) -> None:
        self.weights = weights
        self.load_GE = np.stack([np.asarray(table.sum(axis=0)).ravel() for table in tables])
        self._rows = [
            np.repeat(np.arange(len(w)), np.diff(t.indptr)) for t, w in zip(tables, weights)
        ]
        self._columns = [table.indices for table in tables]
        # Probability that a row's token activates the expert.
        self._odds = [
            np.minimum(table.data.astype(np.float64) / weight[rows], _ALMOST_ONE)
            for table, weight, rows in zip(tables, weights, self._rows)
        ]

    @classmethod
    def of_layer(
        cls, profile: RoutingProfile, placement: Placement, layer: int, *, scheduled: float
    ) -> _HomeTraffic:
        """Split the profile's token ids over the ranks of a placement."""
        ranks = placement.ep_size
        seen = np.flatnonzero(profile.token_count > 0)
        table = sparse.csr_array(profile.token_expert[layer][seen])
        count = profile.token_count[seen]
        share, _ = rank_shares(profile, placement, layer)
        part_VG = np.full((len(seen), ranks), (1 - scheduled) / ranks)
        part_VG[np.arange(len(seen)), share[seen].argmax(axis=1)] += scheduled
        tables, weights = [], []
        for part in part_VG.T:
            here = np.flatnonzero(part)
            tables.append(sparse.csr_array(sparse.diags_array(part[here]) @ table[here]))
            weights.append(count[here] * part[here])
        return cls(tables, weights)

    def needed_rows(self, home: int, serving_E: np.ndarray, rank: int) -> np.ndarray:
        """[E] rows that `home` sends to `rank` for each expert alone, were it served there.

        The other experts are served as `serving_E` says; rows that they need anyway do not count.
        """
        rows, columns, odds = self._rows[home], self._columns[home], self._odds[home]
        weight = self.weights[home]
        if rank == home:
            return np.zeros(len(serving_E))
        here = serving_E[columns] == rank
        unused = np.exp(
            np.bincount(rows[here], weights=np.log1p(-odds[here]), minlength=len(weight))
        )
        alone = odds * (unused * weight)[rows]
        alone[here] /= 1 - odds[here]
        return np.bincount(columns, weights=alone, minlength=len(serving_E))


class _Copies:
    """Which rank serves whom with the copies so far, and with one more.

    Attributes:
        held: [E, G] whether a rank holds an expert.
        serving: [G, E], see `serving_ranks`.
    """

    def __init__(self, traffic: _HomeTraffic, held_EG: np.ndarray, nodes: np.ndarray) -> None:
        self.held, self._traffic, self._nodes = held_EG.copy(), traffic, nodes
        self.serving = serving_ranks(self.held, nodes)
        everyone = range(len(nodes))
        # [G, G, E]: serving ranks, were each expert copied to the first axis' rank too.
        self._with_copy = np.stack([self._serving_with(rank, slice(None)) for rank in everyone])
        # [G, E, G]: see `_HomeTraffic.needed_rows`.
        self._needed = np.stack(
            [
                np.stack(
                    [traffic.needed_rows(home, self.serving[home], rank) for rank in everyone],
                    axis=1,
                )
                for home in everyone
            ]
        )

    def saved_rows(self, rank: int) -> np.ndarray:
        """[E] rows that all ranks together send less after copying each expert to `rank`."""
        now, then = (
            np.take_along_axis(self._needed, serving[:, :, None], axis=2)[:, :, 0]
            for serving in (self.serving, self._with_copy[rank])
        )
        return np.asarray((now - then).sum(axis=0))

    def relief(self, rank: int) -> np.ndarray:
        """[E] activations that the busiest rank loses by copying each expert to `rank`."""
        before, after = (
            _work(self._traffic.load_GE, serving, len(self._nodes))
            for serving in (self.serving, self._with_copy[rank])
        )
        total = before.sum(axis=0)
        return np.asarray(total.max() - (total - before + after).max(axis=1))

    def add(self, expert: int, rank: int) -> None:
        """Copy an expert to a rank."""
        self.held[expert, rank] = True
        before = self.serving[:, expert].copy()
        self.serving[:, expert] = self._with_copy[rank, :, expert]
        for home in np.flatnonzero(self.serving[:, expert] != before):
            for changed in (before[home], self.serving[home, expert]):
                self._needed[home, :, changed] = self._traffic.needed_rows(
                    int(home), self.serving[home], int(changed)
                )
        for other in range(len(self._nodes)):
            again = self._serving_with(other, slice(expert, expert + 1))
            self._with_copy[other, :, expert] = again[:, 0]

    def _serving_with(self, rank: int, experts: slice) -> np.ndarray:
        held = self.held[experts].copy()
        held[:, rank] = True
        return serving_ranks(held, self._nodes)


def _fill_slots(copies: _Copies, slots_per_rank: int, load_weight: float) -> np.ndarray:
    """[G, slots_per_rank] experts copied to each rank."""
    ranks = copies.held.shape[1]
    chosen = np.full((ranks, slots_per_rank), -1, dtype=np.int64)
    for filled in range(slots_per_rank):
        waiting = set(range(ranks))
        while waiting:
            gains = {
                rank: copies.saved_rows(rank) / ranks + load_weight * copies.relief(rank)
                for rank in waiting
            }
            for rank, gain in gains.items():
                gains[rank] = np.where(copies.held[:, rank], -np.inf, gain)
            rank = max(sorted(waiting), key=lambda candidate: float(gains[candidate].max()))
            expert = int(gains[rank].argmax())
            chosen[rank, filled] = expert
            copies.add(expert, rank)
            waiting.remove(rank)
    return chosen


def _work(load_GE: np.ndarray, serving: np.ndarray, ranks: int) -> np.ndarray:
    """[E, G] activations of each expert on each rank."""
    experts = load_GE.shape[1]
    cell = np.arange(experts) * ranks + serving
    return np.bincount(cell.ravel(), weights=load_GE.ravel(), minlength=experts * ranks).reshape(
        experts, ranks
    )
