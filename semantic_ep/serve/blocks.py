"""Blocks of the KV cache: which are free, and which sequence holds which."""

from __future__ import annotations

# Positions of a block.
BLOCK_SIZE = 16


def blocks_for(tokens: int, block_size: int = BLOCK_SIZE) -> int:
    """Blocks that hold this many positions."""
    return -(-tokens // block_size)


class BlockPool:
    """Hands out blocks of equal size.

    Args:
        num_blocks: Blocks in all.
        block_size: Positions of a block.
    """

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Positions of all blocks."""
        return self.num_blocks * self.block_size

    def missing(self, held: list[int], tokens: int) -> int:
        """Blocks that a sequence needs besides those it holds, for this many positions."""
        return max(blocks_for(tokens, self.block_size) - len(held), 0)

    def grow(self, held: list[int], tokens: int) -> bool:
        """Extend a sequence's blocks to hold `tokens` positions; False if there are too few."""
        missing = self.missing(held, tokens)
        if missing > len(self._free):
            return False
        if missing:
            held += self._free[-missing:]
            del self._free[-missing:]
        return True

    def release(self, held: list[int]) -> None:
        """Take back all blocks of a sequence."""
        self._free += held
        held.clear()
