"""Spare slots: second copies of experts, where they save most traffic and level most load.

A copy on rank r serves the tokens whose home is r. What it saves there is the remote rows that have
no other reason: a token still needs the other rank if another of its experts is only there. Slots
are filled one at a time with the copy of largest marginal gain, so a later copy counts on the
earlier ones. `semantic_ep.plan.balance` is the method for expert load alone, without traffic.
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
    scheduled: bool = True

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
    scheduled: bool = True,
    load_weight: float = 0.1,
) -> Placement:
    """Fill spare slots on every rank with copies of experts that are elsewhere.

    Args:
        placement: One copy of each expert; ranks may hold different numbers of experts.
        profile: Routing counts to plan on.
        slots_per_rank: Spare slots a rank gets in each layer.
        topology: Nodes of the ranks; a copy on the home's node is preferred to a farther one.
        scheduled: Whether tokens run on the rank with most of their expected activations; without,
            every rank is taken to have the same mix of tokens.
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
        held_EG = placement.expert_on_rank[layer].copy()
        chosen = _fill_slots(home_traffic, held_EG, nodes, slots_per_rank, load_weight)
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
    token ids at home there or, without a schedule, a G-th share of all ids.
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
        cls, profile: RoutingProfile, placement: Placement, layer: int, *, scheduled: bool
    ) -> _HomeTraffic:
        """Split the profile's token ids over the ranks of a placement."""
        ranks = placement.ep_size
        seen = np.flatnonzero(profile.token_count > 0)
        table = sparse.csr_array(profile.token_expert[layer][seen])
        count = profile.token_count[seen]
        if not scheduled:
            return cls([table / ranks] * ranks, [count / ranks] * ranks)
        share, _ = rank_shares(profile, placement, layer)
        home = share[seen].argmax(axis=1)
        parts = [np.flatnonzero(home == rank) for rank in range(ranks)]
        return cls(
            [sparse.csr_array(table[part]) for part in parts], [count[part] for part in parts]
        )

    def saved_rows(self, home: int, serving_E: np.ndarray) -> np.ndarray:
        """[E] rows that a copy of each expert on `home` would keep from being sent."""
        rows, columns, odds = self._rows[home], self._columns[home], self._odds[home]
        ranks = len(self.weights)
        cell = rows * ranks + serving_E[columns]
        size = len(self.weights[home]) * ranks
        log_unused = np.bincount(cell, weights=np.log1p(-odds), minlength=size)
        # Needed for this expert, and for no other expert on the rank that serves it.
        alone = odds / (1 - odds) * np.exp(log_unused[cell])
        saved = np.bincount(
            columns, weights=alone * self.weights[home][rows], minlength=len(serving_E)
        )
        return np.where(serving_E == home, 0.0, saved)


def _fill_slots(
    traffic: _HomeTraffic,
    held_EG: np.ndarray,
    nodes: np.ndarray,
    slots_per_rank: int,
    load_weight: float,
) -> np.ndarray:
    """[G, slots_per_rank] experts copied to each rank; updates `held_EG`."""
    ranks = held_EG.shape[1]
    chosen = np.full((ranks, slots_per_rank), -1, dtype=np.int64)
    serving = serving_ranks(held_EG, nodes)
    saved = np.stack([traffic.saved_rows(home, serving[home]) for home in range(ranks)])
    for filled in range(slots_per_rank):
        waiting = set(range(ranks))
        while waiting:
            gains = {
                rank: saved[rank] / ranks
                + load_weight * _relief(traffic.load_GE, held_EG, serving, rank, nodes)
                for rank in waiting
            }
            for rank, gain in gains.items():
                gains[rank] = np.where(held_EG[:, rank], -np.inf, gain)
            rank = max(sorted(waiting), key=lambda candidate: float(gains[candidate].max()))
            expert = int(gains[rank].argmax())
            chosen[rank, filled] = expert
            held_EG[expert, rank] = True
            waiting.remove(rank)
            updated = serving_ranks(held_EG, nodes)
            for home in np.flatnonzero((updated != serving).any(axis=1)):
                saved[home] = traffic.saved_rows(int(home), updated[home])
            serving = updated
    return chosen


def _relief(
    load_GE: np.ndarray, held_EG: np.ndarray, serving: np.ndarray, rank: int, nodes: np.ndarray
) -> np.ndarray:
    """[E] activations that the busiest rank loses by a copy of each expert on `rank`."""
    more = held_EG.copy()
    more[:, rank] = True
    before, after = (
        _work(load_GE, serving, len(nodes)),
        _work(load_GE, serving_ranks(more, nodes), len(nodes)),
    )
    total = before.sum(axis=0)
    return np.asarray(total.max() - (total - before + after).max(axis=1))


def _work(load_GE: np.ndarray, serving: np.ndarray, ranks: int) -> np.ndarray:
    """[E, G] activations of each expert on each rank."""
    experts = load_GE.shape[1]
    cell = np.arange(experts) * ranks + serving
    return np.bincount(cell.ravel(), weights=load_GE.ravel(), minlength=experts * ranks).reshape(
        experts, ranks
    )
