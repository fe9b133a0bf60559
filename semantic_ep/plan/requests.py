"""Attention-DP: give whole requests to ranks, by affinity, with equal tokens a rank."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

from semantic_ep.errors import PlacementError, explain

# Requests that are assigned together when plans are judged.
WINDOW_REQUESTS = 64


def assign_requests(
    scores_RG: np.ndarray,
    tokens_R: np.ndarray,
    *,
    tolerance: float = 0.05,
    held_G: np.ndarray | None = None,
    rounds: int = 200,
) -> np.ndarray:
    """Assign a window of requests to ranks: most affinity, under equal tokens a rank.

    Tokens come first: the fullest rank is brought to at most (1 + tolerance) x mean, or to the
    longest request if that is more, as far as moves and swaps of whole requests can, and only then
    is affinity traded. A linear programme that may divide requests comes close to the optimum: it
    leaves fewer than G of them divided, which moves and swaps then mend.

    Args:
        scores_RG: [R, G], affinity of each request for each rank, summed over its tokens
            (`Schedule.request_score`). Only differences in a row matter.
        tokens_R: [R], tokens of each request: prompt, plus what it is expected to generate.
        tolerance: Tokens a rank may exceed the mean by, as a share of the mean.
        held_G: [G], tokens that each rank already holds; they count towards its share.
        rounds: Bound on improving moves and swaps.

    Returns:
        [R] int64, the rank of each request.
    """
    scores = np.asarray(scores_RG, dtype=np.float64)
    tokens = np.asarray(tokens_R, dtype=np.float64)
    if scores.ndim != 2 or tokens.shape != scores.shape[:1] or (tokens < 0).any():
        raise PlacementError(
            explain(
                "request scores must be [R, G] and tokens [R], none negative",
                got=f"{scores.shape} and {tokens.shape}",
            )
        )
    requests, ranks = scores.shape
    held = np.zeros(ranks) if held_G is None else np.asarray(held_G, dtype=np.float64).copy()
    if requests == 0:
        return np.zeros(0, dtype=np.int64)
    # The fullest rank sets the time: where one long request exceeds the share, others may too.
    share = (1 + tolerance) * (held.sum() + tokens.sum()) / ranks
    limit = max(share, float(tokens.max() + held.min()))
    rank_R = _relaxed(scores, tokens, np.maximum(limit - held, 0))
    held += np.bincount(rank_R, weights=tokens, minlength=ranks)
    # One unit of token excess outweighs any affinity that could be gained for it.
    penalty = 1.0 + float(np.ptp(scores, axis=1).sum()) / max(
        float(tokens[tokens > 0].min(initial=1)), 1e-9
    )
    for _ in range(rounds):
        if not _improve(rank_R, held, scores, tokens, limit, penalty):
            break
    return rank_R


def _relaxed(scores: np.ndarray, tokens: np.ndarray, room_G: np.ndarray) -> np.ndarray:
    """[R] int64, the rank with most of each request in the best division of all requests."""
    requests, ranks = scores.shape
    each = np.arange(requests * ranks)
    whole = sparse.csr_array((np.ones(len(each)), (each // ranks, each)))
    filled = sparse.csr_array((np.repeat(tokens, ranks), (each % ranks, each)))
    solution = linprog(
        -scores.ravel(),
        A_ub=filled,
        b_ub=room_G,
        A_eq=whole,
        b_eq=np.ones(requests),
        method="highs",
    )
    # What ranks already hold can leave too little room for any division: begin from affinity.
    part = scores if solution.x is None else solution.x.reshape(requests, ranks)
    return np.asarray(part.argmax(axis=1))


def _improve(
    rank_R: np.ndarray,
    held_G: np.ndarray,
    scores: np.ndarray,
    tokens: np.ndarray,
    limit: float,
    penalty: float,
) -> bool:
    """Apply the best single move or swap in place; False when none helps."""
    index = np.arange(len(scores))
    current = scores[index, rank_R]
    excess = np.maximum(held_G - limit, 0)
    left = np.maximum(held_G[rank_R] - tokens - limit, 0) - excess[rank_R]
    entered = np.maximum(held_G[None, :] + tokens[:, None] - limit, 0) - excess[None, :]
    move = scores - current[:, None] - penalty * (left[:, None] + entered)
    move[index, rank_R] = -np.inf
    there = scores[:, rank_R]  # [r, q]: score of request r on the rank of request q
    change = tokens[None, :] - tokens[:, None]
    after_r = np.maximum(held_G[rank_R][:, None] + change - limit, 0) - excess[rank_R][:, None]
    after_q = np.maximum(held_G[rank_R][None, :] - change - limit, 0) - excess[rank_R][None, :]
    swap = there + there.T - current[:, None] - current[None, :] - penalty * (after_r + after_q)
    swap[rank_R[:, None] == rank_R[None, :]] = -np.inf
    best_move, best_swap = float(move.max()), float(swap.max())
    if max(best_move, best_swap) <= 1e-9:
        return False
    if best_move >= best_swap:
        request, rank = np.unravel_index(int(np.argmax(move)), move.shape)
        held_G[rank_R[request]] -= tokens[request]
        held_G[rank] += tokens[request]
        rank_R[request] = rank
    else:
        first, second = np.unravel_index(int(np.argmax(swap)), swap.shape)
        difference = tokens[second] - tokens[first]
        held_G[rank_R[first]] += difference
        held_G[rank_R[second]] -= difference
        rank_R[[first, second]] = rank_R[[second, first]]
    return True


def assign_in_windows(
    scores_RG: np.ndarray,
    tokens_R: np.ndarray,
    *,
    window: int = WINDOW_REQUESTS,
    tolerance: float = 0.05,
) -> np.ndarray:
    """[R] int64, ranks of requests assigned window after window, in order of arrival.

    Each window is balanced by itself, so no rank waits for a later window.
    """
    parts = [
        assign_requests(
            scores_RG[start : start + window],
            tokens_R[start : start + window],
            tolerance=tolerance,
        )
        for start in range(0, len(scores_RG), window)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
