"""ExFlow: experts of consecutive layers that follow each other share a rank.

Minimises the transitions that change rank, with E/G experts of every layer on every rank, on the
aggregated form of its integer program (counts of expert pairs in place of single tokens, which has
the same optimum). The paper solves it with a commercial solver in steps of 60 s; here layers take
turns with an exact linear assignment given their neighbours, from several starts. Two stages where
there are nodes: nodes first, then ranks in each.

What it saves is saved only by runtimes in which a token stays where its last expert was. Where
tokens return home after each layer, it is one more balanced placement.
"""

from __future__ import annotations

import time

import numpy as np

from semantic_ep.plan.assignment import assign_experts
from semantic_ep.plan.baselines.simple import contiguous_placement
from semantic_ep.plan.placement import Placement

_SWEEPS = 50


def exflow_placement(
    transition: np.ndarray,
    *,
    ep_size: int,
    num_nodes: int = 1,
    starts: int = 8,
    seed: int = 0,
    time_limit: float | None = 60.0,
) -> Placement:
    """Align the experts of neighbouring layers.

    Args:
        transition: [L - 1, E, E] activation pairs (expert in layer l, expert in layer l + 1).
        ep_size: EP ranks (G), which divides E.
        num_nodes: Nodes, each with the same number of ranks.
        starts: Starts of the alternation; the first is contiguous, the others random.
        seed: Seed of the random starts.
        time_limit: Seconds, after which no new start is made; None for no limit.
    """
    layers, experts = len(transition) + 1, transition.shape[1]
    contiguous_placement(num_layers=1, num_experts=experts, ep_size=ep_size)
    deadline = None if time_limit is None else time.monotonic() + time_limit
    rng = np.random.default_rng(seed)
    node = _best_chain(transition, num_nodes, layers, starts, rng, deadline)
    per_node = ep_size // num_nodes
    rank = np.empty_like(node)
    for number in range(num_nodes):
        members = np.stack([np.flatnonzero(row == number) for row in node])
        inside = np.stack(
            [
                transition[layer][np.ix_(members[layer], members[layer + 1])]
                for layer in range(layers - 1)
            ]
        ) if layers > 1 else transition[:, :0, :0]  # fmt: skip
        local = _best_chain(inside, per_node, layers, starts, rng, deadline, members.shape[1])
        np.put_along_axis(rank, members, number * per_node + local, axis=1)
    return Placement.from_rank_of_expert(rank, ep_size=ep_size)


def kept_transitions(transition: np.ndarray, part: np.ndarray) -> float:
    """Transitions between experts of one part. `part` is [L, E]."""
    same = part[:-1, :, None] == part[1:, None, :]
    return float((transition * same).sum())


def _best_chain(
    transition: np.ndarray,
    parts: int,
    layers: int,
    starts: int,
    rng: np.random.Generator,
    deadline: float | None,
    experts: int | None = None,
) -> np.ndarray:
    """[L, E] part of each expert, the best of several starts."""
    experts = transition.shape[1] if experts is None else experts
    best = np.tile(np.repeat(np.arange(parts), experts // parts), (layers, 1))
    if parts == 1 or layers == 1:
        return best
    best_kept = -np.inf
    start = best
    for _ in range(starts):
        part = _alternate(transition, start.copy(), parts)
        kept = kept_transitions(transition, part)
        if kept > best_kept:
            best, best_kept = part, kept
        if deadline is not None and time.monotonic() > deadline:
            break
        start = rng.permuted(best, axis=1)
    return best


def _alternate(transition: np.ndarray, part: np.ndarray, parts: int) -> np.ndarray:
    """Reassign layers in turn, forwards and backwards, until nothing is gained."""
    layers = len(part)
    onehot = np.eye(parts)
    kept = -1.0
    for sweep in range(_SWEEPS):
        order = range(layers) if sweep % 2 == 0 else range(layers - 1, -1, -1)
        for layer in order:
            gain = np.zeros((parts, part.shape[1]))
            if layer > 0:
                gain += onehot[part[layer - 1]].T @ transition[layer - 1]
            if layer < layers - 1:
                gain += (transition[layer] @ onehot[part[layer + 1]]).T
            part[layer] = assign_experts(gain)
        reached = kept_transitions(transition, part)
        if reached <= kept:
            break
        kept = reached
    return part
