"""Which rank has how much of a prompt in its prefix cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


def block_keys(token_ids: Sequence[int], block_size: int) -> list[int]:
    """Keys of a prompt's whole blocks; a key stands for its block and all before it.

    The last token is left out: it must be computed for the first new token to follow from it.
    """
    keys, key = [], 0
    for start in range(0, len(token_ids) - block_size, block_size):
        key = hash((key, tuple(token_ids[start : start + block_size])))
        keys.append(key)
    return keys


class PrefixIndex:
    """Blocks that ranks have cached, each rank dropping what it has not used for longest.

    Args:
        ep_size: Number of EP ranks (G).
        block_size: Tokens of a block.
        tokens_per_rank: Tokens that a rank caches.
    """

    def __init__(self, *, ep_size: int, block_size: int, tokens_per_rank: int) -> None:
        self.block_size = block_size
        self._blocks_per_rank = tokens_per_rank // block_size
        self._ranks: dict[int, int] = {}  # block -> ranks that have it, as bits
        self._blocks: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(ep_size)]

    def cached_tokens(self, keys: Sequence[int]) -> np.ndarray:
        """[G] int64, leading tokens that each rank has; `keys` are those of `block_keys`."""
        cached = np.zeros(len(self._blocks), dtype=np.int64)
        having = -1
        for number, key in enumerate(keys):
            still = having & self._ranks.get(key, 0)
            if number and still != having:
                self._set(cached, having & ~still, number * self.block_size)
            having = still
            if not having:
                return cached
        if keys:
            self._set(cached, having, len(keys) * self.block_size)
        return cached

    def insert(self, keys: Sequence[int], rank: int) -> None:
        """Note that a rank has these blocks, used just now."""
        blocks, bit = self._blocks[rank], 1 << rank
        # From the end, so that a prefix outlives what follows it.
        for key in reversed(keys):
            if key in blocks:
                blocks.move_to_end(key)
            else:
                blocks[key] = None
                self._ranks[key] = self._ranks.get(key, 0) | bit
        while len(blocks) > self._blocks_per_rank:
            key, _ = blocks.popitem(last=False)
            self._ranks[key] &= ~bit
            if not self._ranks[key]:
                del self._ranks[key]

    @staticmethod
    def _set(cached_G: np.ndarray, ranks: int, tokens: int) -> None:
        while ranks:
            lowest = ranks & -ranks
            cached_G[lowest.bit_length() - 1] = tokens
            ranks ^= lowest
