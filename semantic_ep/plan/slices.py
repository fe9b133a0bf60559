"""Attention-TP: divide a batch of tokens into equal slices, one a rank, with most affinity.

This is a transportation problem with G columns. Prices on ranks come first (coordinate ascent on
the dual, vectorised over batches), and make the unconstrained choice nearly balanced; shortest
augmenting paths between ranks then move the remaining tokens. A choice that is best under some
prices is optimal for the slice sizes it has, and shortest paths keep that, so the result is an
optimum, not an approximation.
"""

from __future__ import annotations

import numpy as np

from semantic_ep.errors import PlacementError, explain

# Tokens in a batch when plans are judged.
BATCH_TOKENS = 512
_SWEEPS = 4


def slice_sizes(tokens: int, ep_size: int) -> np.ndarray:
    """[G] int64, sizes that differ by at most one and sum to `tokens`, larger ones first."""
    sizes = np.full(ep_size, tokens // ep_size, dtype=np.int64)
    sizes[: tokens % ep_size] += 1
    return sizes


def natural_slices(tokens: int, ep_size: int, *, batch: int) -> np.ndarray:
    """[N] int64, home ranks when each batch is cut in order, as runtimes without a schedule do."""
    parts = [
        np.repeat(np.arange(ep_size), slice_sizes(min(batch, tokens - start), ep_size))
        for start in range(0, tokens, batch)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def equal_slices(scores: np.ndarray) -> np.ndarray:
    """Choose a home rank for every token of a batch, with exactly equal slices.

    Args:
        scores: [T, G], or [B, T, G] for B independent batches: gain of a token on each rank.

    Returns:
        [T] or [B, T] int64 of maximal total score, to within 1e-7 of the scores' range a token;
        rank g gets `slice_sizes(T, G)[g]` tokens.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim not in (2, 3) or not np.isfinite(scores).all():
        raise PlacementError(
            explain("scores must be finite, [T, G] or [B, T, G]", got=f"shape {scores.shape}")
        )
    batches = scores if scores.ndim == 3 else scores[None]
    _, tokens, ranks = batches.shape
    if batches.size == 0 or ranks == 1:
        return np.zeros(scores.shape[:-1], dtype=np.int64)
    sizes = slice_sizes(tokens, ranks)
    batches = batches + _tie_breaker(batches)
    price = _prices(batches, sizes)
    home: np.ndarray = (batches - price[:, None, :]).argmax(axis=2)
    _augment(batches, home, sizes)
    return home if scores.ndim == 3 else home[0]


def slices_in_batches(scores_NG: np.ndarray, *, batch: int) -> np.ndarray:
    """[N] int64, `equal_slices` of every `batch` consecutive tokens; the last may be shorter."""
    tokens, ranks = scores_NG.shape
    whole = tokens - tokens % batch
    full = equal_slices(scores_NG[:whole].reshape(-1, batch, ranks)).reshape(-1)
    return np.concatenate([full, equal_slices(scores_NG[whole:])]) if whole < tokens else full


def _tie_breaker(scores: np.ndarray) -> np.ndarray:
    """[T, G], too small to matter: copies of one token id need not all change rank together."""
    scale = float(np.ptp(scores)) or 1.0
    return 1e-7 * scale * np.random.default_rng(0).random(scores.shape[1:])


def _prices(scores: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[B, G], prices under which about sizes[g] tokens prefer rank g."""
    batches, tokens, ranks = scores.shape
    price = np.zeros((batches, ranks))
    for _ in range(_SWEEPS):
        for rank in range(ranks):
            net = scores - price[:, None, :]
            net[:, :, rank] = -np.inf
            margin = scores[:, :, rank] - net.max(axis=2)
            cut = tokens - int(sizes[rank])
            # Between the last token that should come and the first that should not.
            part = np.partition(margin, [max(cut - 1, 0), min(cut, tokens - 1)], axis=1)
            price[:, rank] = (part[:, max(cut - 1, 0)] + part[:, min(cut, tokens - 1)]) / 2
    return price


def _augment(scores: np.ndarray, home: np.ndarray, sizes: np.ndarray) -> None:
    """Move tokens along cheapest chains of ranks until every slice has its size; in place."""
    ranks = scores.shape[2]
    counts = np.stack([(home == rank).sum(axis=1) for rank in range(ranks)], axis=1)
    active = np.flatnonzero((counts != sizes).any(axis=1))
    while active.size:
        cost, mover = _cheapest_moves(scores[active], home[active])
        over = counts[active] > sizes
        reach, parent = _shortest_paths(cost, over)
        reach = np.where(counts[active] < sizes, reach, np.inf)
        rank = reach.argmin(axis=1)
        row = np.arange(len(active))
        counts[active, rank] += 1
        moving = np.ones(len(active), dtype=bool)
        while moving.any():
            source = parent[row, rank]
            moving &= source >= 0
            here = row[moving]
            home[active[here], mover[here, source[here], rank[here]]] = rank[here]
            rank = np.where(moving, source, rank)
        counts[active, rank] -= 1
        active = active[(counts[active] != sizes).any(axis=1)]


def _cheapest_moves(scores: np.ndarray, home: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[B, G, G] least loss of moving one token from rank i to rank j, and [B, G, G] that token."""
    batches, _, ranks = scores.shape
    own = np.take_along_axis(scores, home[:, :, None], axis=2)
    loss = own - scores
    cost = np.empty((batches, ranks, ranks))
    mover = np.empty((batches, ranks, ranks), dtype=np.int64)
    for rank in range(ranks):
        masked = np.where((home == rank)[:, :, None], loss, np.inf)
        mover[:, rank] = masked.argmin(axis=1)
        cost[:, rank] = np.take_along_axis(masked, mover[:, rank][:, None, :], axis=1)[:, 0]
    cost[:, np.arange(ranks), np.arange(ranks)] = np.inf
    return cost, mover


def _shortest_paths(cost: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[B, G] distance from the nearest source, and the rank before; -1 at a source."""
    distance = np.where(source, 0.0, np.inf)
    parent = np.full(source.shape, -1)
    for _ in range(cost.shape[1] - 1):
        through = distance[:, :, None] + cost
        via = through.argmin(axis=1)
        found = np.take_along_axis(through, via[:, None, :], axis=1)[:, 0]
        # The margin keeps rounding from closing a cycle of zero length.
        better = found < distance - 1e-12
        if not better.any():
            break
        distance = np.where(better, found, distance)
        parent = np.where(better, via, parent)
    return distance, parent
