"""Which rank has how much of a prompt in its prefix cache."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

# Of more than 4 blocks every other one ends a stretch, of more than 8 every fourth, and so on: a
# long prompt then has few stretches, those of several blocks at most half of what is before.
_FINE_BLOCKS = 4
_ROUND_BLOCKS = tuple(
    number << shift
    for shift in range(20)
    for number in range(1 if shift == 0 else _FINE_BLOCKS // 2 + 1, _FINE_BLOCKS + 1)
)
# Tokens of a stretch that its key is made of. Prompts that differ in others alone are taken for
# equal, which costs the time to compute what was thought to be cached, and nothing else.
_SAMPLED_TOKENS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix:
    """Beginnings of a prompt, each one longer.

    Attributes:
        keys: Each stands for everything up to its end.
        ends: Tokens up to there.
    """

    keys: Sequence[int] = ()
    ends: Sequence[int] = ()


def blocks_of(token_ids: Sequence[int], block_size: int) -> Prefix:
    """Every whole block of a prompt, as a rank caches them.

    The last token is left out: it must be computed for the first new token to follow from it.
    """
    ends = range(block_size, len(token_ids), block_size)
    keys, key = [], 0
    for end in ends:
        key = hash((key, tuple(token_ids[end - block_size : end])))
        keys.append(key)
    return Prefix(keys=keys, ends=ends)


def stretches_of(token_ids: Sequence[int], block_size: int) -> Prefix:
    """Stretches of whole blocks, for a quick estimate of what a rank has cached."""
    ends, cuts = _cuts(bisect_right(_ROUND_BLOCKS, (len(token_ids) - 1) // block_size), block_size)
    keys, key = [], 0
    for cut in cuts:
        key = hash((key, *token_ids[cut]))
        keys.append(key)
    return Prefix(keys=keys, ends=ends)


@functools.cache
def _cuts(count: int, block_size: int) -> tuple[list[int], list[slice]]:
    """Ends of the first stretches, and which of its tokens the key of each is made of."""
    ends = [number * block_size for number in _ROUND_BLOCKS[:count]]
    cuts = [
        slice(start, end, -(-(end - start) // _SAMPLED_TOKENS))
        for start, end in itertools.pairwise([0, *ends])
    ]
    return ends, cuts


class PrefixIndex:
    """Beginnings that ranks have cached, each rank dropping what it has not used for longest.

    Args:
        ep_size: Number of EP ranks (G).
        block_size: Tokens of a block.
        tokens_per_rank: Tokens that a rank caches.
    """

    def __init__(self, *, ep_size: int, block_size: int, tokens_per_rank: int) -> None:
        self.block_size = block_size
        self._tokens_per_rank = tokens_per_rank
        self._ranks: dict[int, int] = {}  # key -> ranks that have it, as bits
        # Of each rank: key -> tokens that it adds to the key before it.
        self._cached: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(ep_size)]
        self._total = [0] * ep_size

    def cached_tokens(self, prefix: Prefix) -> np.ndarray:
        """[G] int64, leading tokens that each rank has."""
        cached = np.zeros(len(self._cached), dtype=np.int64)
        having, before = -1, 0
        for key, end in zip(prefix.keys, prefix.ends):
            still = having & self._ranks.get(key, 0)
            if before and still != having:
                self._set(cached, having & ~still, before)
            having, before = still, end
            if not having:
                return cached
        if before:
            self._set(cached, having, before)
        return cached

    def insert(self, prefix: Prefix, rank: int) -> None:
        """Note that a rank has these, used just now."""
        cached, bit = self._cached[rank], 1 << rank
        keys, ends, ranks = prefix.keys, prefix.ends, self._ranks
        known = 0
        while known < len(keys) and keys[known] in ranks:
            known += 1
        new = keys[known:]
        # From the end, so that a beginning outlives what follows it.
        if new and ranks.keys().isdisjoint(new):  # As for most prompts: fewer look-ups do.
            end = ends[-1]
            for key, start in zip(reversed(new), reversed((0, *ends[:-1]))):
                cached[key] = end - start
                ranks[key] = bit
                end = start
            self._total[rank] += ends[-1] - end
        else:
            known = len(keys)
        for number in range(known - 1, -1, -1):
            key = keys[number]
            if key in cached:
                cached.move_to_end(key)
            else:
                cached[key] = tokens = ends[number] - (ends[number - 1] if number else 0)
                self._total[rank] += tokens
                ranks[key] = ranks.get(key, 0) | bit
        while self._total[rank] > self._tokens_per_rank:
            key, tokens = cached.popitem(last=False)
            self._total[rank] -= tokens
            self._ranks[key] &= ~bit
            if not self._ranks[key]:
                del self._ranks[key]

    @staticmethod
    def _set(cached_G: np.ndarray, ranks: int, tokens: int) -> None:
        while ranks:
            lowest = ranks & -ranks
            cached_G[lowest.bit_length() - 1] = tokens
            ranks ^= lowest
