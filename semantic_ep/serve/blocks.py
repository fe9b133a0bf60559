"""Blocks of the KV cache: which are free, and which sequence holds which."""

from __future__ import annotations

import numpy as np

# Positions of a block.
BLOCK_SIZE = 16


def blocks_for(tokens: int, block_size: int = BLOCK_SIZE) -> int:
    """Blocks that hold this many positions."""
    return -(-tokens // block_size)


class BlockPool:
    """Hands out blocks of equal size.

    A sequence's blocks follow each other where possible, because attention on a CPU then reads
    them where they are. For that the pool keeps the blocks that a sequence is expected to grow
    into from others as long as it has different ones; it never refuses a free block.

    Args:
        num_blocks: Blocks in all.
        block_size: Positions of a block.
    """

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_free = num_blocks
        self._free = np.ones(num_blocks, dtype=bool)
        self._expected = np.zeros(num_blocks, dtype=bool)
        # First block of a sequence -> end of the range that it is expected to need.
        self._ends: dict[int, int] = {}

    @property
    def capacity(self) -> int:
        """Positions of all blocks."""
        return self.num_blocks * self.block_size

    def missing(self, held: list[int], tokens: int) -> int:
        """Blocks that a sequence needs besides those it holds, for this many positions."""
        return max(blocks_for(tokens, self.block_size) - len(held), 0)

    def grow(self, held: list[int], tokens: int, *, expected: int = 0) -> bool:
        """Extend a sequence's blocks to hold `tokens` positions; False if there are too few.

        Args:
            held: Blocks of the sequence; extended in place.
            tokens: Positions that it needs now.
            expected: Positions that it will probably come to need; counts for its first blocks.
        """
        missing = self.missing(held, tokens)
        if missing > self.num_free:
            return False
        if missing:
            taken = self._following(held, missing, blocks_for(expected, self.block_size))
            if len(taken) < missing:
                taken += self._anywhere(missing - len(taken))
            held += taken
        return True

    def release(self, held: list[int]) -> None:
        """Take back all blocks of a sequence."""
        if held:
            self._free[held] = True
            self.num_free += len(held)
            end = self._ends.pop(held[0], held[0])
            self._expected[held[0] : end] = False
        held.clear()

    def _following(self, held: list[int], missing: int, expected: int) -> list[int]:
        """Take at most `missing` blocks that continue a sequence, or begin one."""
        if held:
            begin, own_end = held[-1] + 1, self._ends.get(held[0], 0)
        else:
            begin, own_end = self._begin(max(missing, expected))
        taken = []
        for block in range(begin, min(begin + missing, self.num_blocks)):
            if not self._free[block] or (self._expected[block] and block >= own_end):
                break
            taken.append(block)
        self._take(taken)
        return taken

    def _begin(self, count: int) -> tuple[int, int]:
        """Range for a new sequence, of `count` blocks that nobody holds or expects to.

        The smallest gap that is large enough, or else the largest one.
        """
        edges = np.flatnonzero(np.diff(self._free & ~self._expected, prepend=False, append=False))
        if not len(edges):
            return self.num_blocks, 0
        starts, sizes = edges[::2], np.diff(edges)[::2]
        fits = np.flatnonzero(sizes >= count)
        chosen = fits[sizes[fits].argmin()] if len(fits) else sizes.argmax()
        begin = int(starts[chosen])
        end = begin + min(count, int(sizes[chosen]))
        self._ends[begin] = end
        self._expected[begin:end] = True
        return begin, end

    def _anywhere(self, count: int) -> list[int]:
        """Take blocks that nobody expects to need, then those that somebody does."""
        unexpected = np.flatnonzero(self._free & ~self._expected)[:count]
        expected = np.flatnonzero(self._free & self._expected)[: count - len(unexpected)]
        taken = [*unexpected.tolist(), *expected.tolist()]
        self._take(taken)
        return taken

    def _take(self, blocks: list[int]) -> None:
        self._free[blocks] = False
        self.num_free -= len(blocks)
