"""Alternating co-clustering: rows choose ranks, experts follow, each step exact for its half.

Rows are sequences, token ids or sampled tokens. One assignment of rows may rule many layers (whole
requests: the clusters of all layers then share one numbering) or a single one.
"""

from __future__ import annotations

import time

import numpy as np
from scipy import sparse

from semantic_ep.plan.assignment import assign_experts, assign_in_groups

LOAD_PENALTY = 2.0


def cocluster(
    tables: list[sparse.csr_array],
    weight: np.ndarray,
    ep_size: int,
    *,
    rng: np.random.Generator,
    pairs_LEE: np.ndarray,
    load_cap: float,
    first: np.ndarray | None = None,
    deadline: float | None = None,
    iterations: int = 30,
    router_groups: int = 1,
) -> tuple[np.ndarray, float]:
    """Cluster rows and the experts of all tables together, from one start.

    Args:
        tables: L arrays [N, E], activations of each expert by each row.
        weight: [N] tokens in each row, positive.
        ep_size: Clusters (G).
        rng: Draws the start.
        pairs_LEE: [L, E, E] share of activations saved from travelling twice to one rank when
            two experts share it (see `search.saving_by_pairs`, over K).
        load_cap: Expert load a rank, over the mean, from which a penalty counts.
        first: [L, E] placement to start from; random rows without.
        deadline: `time.monotonic()` after which no further alternation begins.
        iterations: Bound on alternations.
        router_groups: Groups of neighbouring experts that stay on a block of neighbouring ranks;
            divides G.

    Returns:
        [L, E] rank of each expert, E / G on each rank in each layer, and the value reached: local
        share of activations plus share saved by pairs less the load penalty.
    """
    layers, rows = len(tables), len(weight)
    stacked = sparse.csr_array(sparse.hstack(tables))
    total = float(stacked.sum()) or 1.0
    load_LE = np.asarray(stacked.sum(axis=0)).reshape(layers, -1)
    load_LE = load_LE * (ep_size / np.maximum(load_LE.sum(axis=1, keepdims=True), 1e-12))
    rank_N = rng.integers(ep_size, size=rows)
    if first is not None:
        rank_N = choose_ranks(_on_ranks(stacked, first, ep_size) / weight[:, None], weight)
    best, best_value = first, -np.inf
    for _ in range(iterations):
        member = sparse.csr_array((np.ones(rows), (rank_N, np.arange(rows))), (ep_size, rows))
        gain_LGE = (member @ stacked).toarray().reshape(ep_size, layers, -1).swapaxes(0, 1)
        gain_LGE = gain_LGE * (layers / total)
        rank_LE = np.empty(load_LE.shape, dtype=np.int64)
        value = 0.0
        for layer in range(layers):
            rank_LE[layer], reached = place_experts(
                gain_LGE[layer],
                pairs_LEE[layer],
                load_LE[layer],
                load_cap=load_cap,
                router_groups=router_groups,
            )
            value += reached / layers
        rank_N = choose_ranks(_on_ranks(stacked, rank_LE, ep_size) / weight[:, None], weight)
        if value <= best_value + 1e-5:
            break
        best, best_value = rank_LE, value
        if deadline is not None and time.monotonic() > deadline:
            break
    assert best is not None
    return best, best_value


def value_of(
    tables: list[sparse.csr_array],
    weight: np.ndarray,
    rank_LE: np.ndarray,
    ep_size: int,
    *,
    pairs_LEE: np.ndarray,
    load_cap: float,
) -> float:
    """What `cocluster` maximises, for experts as they are placed and rows on the ranks they choose.

    Args:
        tables: See `cocluster`, as are the others.
        weight: [N] tokens in each row.
        rank_LE: [L, E] rank of each expert.
        ep_size: Clusters (G).
        pairs_LEE: [L, E, E] share saved by two experts on one rank.
        load_cap: Load of a rank from which the penalty counts.
    """
    stacked = sparse.csr_array(sparse.hstack(tables))
    held_NG = _on_ranks(stacked, rank_LE, ep_size)
    rank_N = choose_ranks(held_NG / weight[:, None], weight)
    value = float(held_NG[np.arange(len(weight)), rank_N].sum()) / (float(stacked.sum()) or 1.0)
    for table, rank_E, pairs_EE in zip(tables, rank_LE, pairs_LEE, strict=True):
        load_E = np.asarray(table.sum(axis=0)).ravel()
        share_E = load_E * (ep_size / max(float(load_E.sum()), 1e-12))
        load_G = np.bincount(rank_E, weights=share_E, minlength=ep_size)
        together = float(pairs_EE[rank_E[:, None] == rank_E].sum() - np.trace(pairs_EE)) / 2
        penalty = LOAD_PENALTY / ep_size * float(_excess(load_G, load_cap).sum())
        value += (together - penalty) / len(tables)
    return value


def place_experts(
    gain_GE: np.ndarray,
    pairs_EE: np.ndarray,
    load_E: np.ndarray,
    *,
    load_cap: float,
    router_groups: int = 1,
) -> tuple[np.ndarray, float]:
    """Place experts for given rows: linear assignment, then best swaps for pairs and load.

    Args:
        gain_GE: [G, E] share of activations that become local with an expert on a rank.
        pairs_EE: [E, E] share saved when two experts share a rank, symmetric.
        load_E: [E] load of an expert over the mean load of a rank.
        load_cap: Load of a rank from which the penalty counts.
        router_groups: See `cocluster`.

    Returns:
        [E] ranks, E / G on each, and their value.
    """
    ranks, experts = gain_GE.shape
    pairs = pairs_EE - np.diag(np.diag(pairs_EE))
    rank_E = (
        assign_experts(gain_GE) if router_groups == 1 else assign_in_groups(gain_GE, router_groups)
    )
    index = np.arange(experts)
    group_E = index * router_groups // experts
    fixed = group_E[:, None] != group_E
    onto = np.eye(ranks)[rank_E]
    near_EG = pairs @ onto
    rank_load = load_E @ onto
    for _ in range(experts):
        value_EG = gain_GE.T + near_EG
        stay = value_EG[index, rank_E]
        there = value_EG[:, rank_E]
        change = there + there.T - stay[:, None] - stay - 2 * pairs
        moved = load_E - load_E[:, None]
        after = _excess(rank_load[rank_E][:, None] + moved, load_cap)
        now = _excess(rank_load, load_cap)[rank_E]
        change -= LOAD_PENALTY / ranks * (after + after.T - now[:, None] - now)
        change[fixed | (rank_E[:, None] == rank_E)] = 0.0
        chosen = _independent_swaps(change, rank_E, ranks)
        if not chosen:
            break
        for one, other in chosen:
            here, away = rank_E[one], rank_E[other]
            near_EG[:, here] += pairs[:, other] - pairs[:, one]
            near_EG[:, away] += pairs[:, one] - pairs[:, other]
            rank_load[here] += load_E[other] - load_E[one]
            rank_load[away] += load_E[one] - load_E[other]
            rank_E[one], rank_E[other] = away, here
    local = float(gain_GE[rank_E, index].sum())
    saved = float(near_EG[index, rank_E].sum()) / 2
    return rank_E, local + saved - LOAD_PENALTY / ranks * float(_excess(rank_load, load_cap).sum())


def _independent_swaps(
    change_EE: np.ndarray, rank_E: np.ndarray, ranks: int
) -> list[tuple[int, int]]:
    """Best improving swaps of which no two touch one rank: their gains then add up."""
    best_E = change_EE.argmax(axis=1)
    gain_E = change_EE[np.arange(len(best_E)), best_E]
    free = np.ones(ranks, dtype=bool)
    chosen = []
    for one in np.argsort(-gain_E, kind="stable"):
        other = best_E[one]
        if gain_E[one] <= 1e-9:
            break
        if free[rank_E[one]] and free[rank_E[other]]:
            free[[rank_E[one], rank_E[other]]] = False
            chosen.append((int(one), int(other)))
    return chosen


def choose_ranks(scores: np.ndarray, weight: np.ndarray, *, sweeps: int = 4) -> np.ndarray:
    """[N] rank of each row of best score, under prices that give ranks equal weight.

    Args:
        scores: [N, G] gain of a row on a rank, a unit of weight.
        weight: [N] tokens in each row.
        sweeps: Passes of coordinate ascent on the prices.
    """
    rows, ranks = scores.shape
    price = np.zeros(ranks)
    share = weight.sum() * (1 - 1 / ranks)
    for _ in range(sweeps):
        for rank in range(ranks):
            net = scores - price
            net[:, rank] = -np.inf
            margin = scores[:, rank] - net.max(axis=1)
            order = np.argsort(margin, kind="stable")
            cut = int(np.searchsorted(np.cumsum(weight[order]), share))
            price[rank] = margin[order[min(cut, rows - 1)]]
    return np.asarray((scores - price).argmax(axis=1))


def _on_ranks(stacked: sparse.csr_array, rank_LE: np.ndarray, ep_size: int) -> np.ndarray:
    """[N, G] activations of each row on each rank."""
    return np.asarray(stacked @ np.eye(ep_size)[rank_LE.ravel()])


def _excess(load: np.ndarray, cap: float) -> np.ndarray:
    return np.maximum(load - cap, 0.0)
