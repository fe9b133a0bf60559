"""Blocks of the KV cache: which are free, which hold a known beginning, and who holds which."""

from __future__ import annotations

import array
import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence

import numpy as np

# Positions of a block.
BLOCK_SIZE = 16


def blocks_for(tokens: int, block_size: int = BLOCK_SIZE) -> int:
    """Blocks that hold this many positions."""
    return -(-tokens // block_size)


def block_name(before: bytes, token_ids: Sequence[int]) -> bytes:
    """Name of a full block: of its tokens and of all before them, which its keys depend on.

    A cryptographic hash, because nobody compares the tokens again: a client who could make two
    prompts of one name would be answered from another's keys.

    Args:
        before: Name of the block before; empty for the first one.
        token_ids: Of the block.
    """
    content = before + array.array("q", token_ids).tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


class BlockPool:
    """Hands out blocks of equal size, and keeps what full ones hold for sequences that begin alike.

    A block is free, held by one or more sequences, or kept: full, named, and held by nobody. Kept
    blocks are given up when too few are free for a sequence and what it is expected to grow into,
    or when free ones are too scattered for it: the one first that was not used for longest, the end
    of a sequence before its beginning. Only full blocks get names, so that no block is shared that
    is still written to.

    A sequence's blocks follow each other where possible, because attention on a CPU then reads
    them where they are. For that the pool keeps the blocks that a sequence is expected to grow
    into from others as long as it has different ones, kept ones included; it never refuses a block
    that nobody holds.

    Args:
        num_blocks: Blocks in all.
        block_size: Positions of a block.

    Attributes:
        num_free: Blocks that no sequence holds, kept ones included.
    """

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_free = num_blocks
        self._free = np.ones(num_blocks, dtype=bool)
        self._expected = np.zeros(num_blocks, dtype=bool)
        self._holders: Counter[int] = Counter()
        # First block of its own of each sequence -> end of the range that it will probably need.
        self._ends: dict[int, int] = {}
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # by last use

    @property
    def capacity(self) -> int:
        """Positions of all blocks."""
        return self.num_blocks * self.block_size

    def missing(self, held: list[int], tokens: int) -> int:
        """Blocks that a sequence needs besides those it holds, for this many positions."""
        return max(blocks_for(tokens, self.block_size) - len(held), 0)

    def begin(
        self, held: list[int], tokens: int, *, names: Sequence[bytes] = (), expected: int = 0
    ) -> int | None:
        """Give a sequence its first blocks, those that are known by name among them.

        Args:
            held: Blocks of the sequence, none yet; extended in place.
            tokens: Positions that it needs now, more than the named blocks hold.
            names: Of its first blocks, in order.
            expected: Positions that it will probably come to need.

        Returns:
            How many of the blocks are full already; None, with nothing changed, if there are too
            few blocks.
        """
        known: list[int] = []
        for name in names:
            block = self._block_of.get(name)
            if block is None:
                break
            known.append(block)
        kept = sum(block in self._kept for block in known)
        missing = self.missing(known, tokens)
        assert missing > 0
        assert not held
        if missing > self.num_free - kept:
            return None
        for block in known:
            self._kept.pop(block, None)
        self._holders.update(known)
        self.num_free -= kept
        held += known
        longest = max(missing, self.missing(known, expected))
        self._make_room(longest)
        after = held[-1] + 1 if held else None
        start, end = self._range(after, longest)
        # The oldest kept blocks mostly follow each other: a few more of them make a gap. Not all
        # of them, which may not be enough either.
        left = longest
        while end - start < longest and self._kept and left > 0:
            more = min(longest - (end - start), left, len(self._kept))
            for _ in range(more):
                self._give_up()
            left -= more
            start, end = self._range(after, longest)
        own = self._following(start, end, missing)
        own += self._anywhere(missing - len(own))
        # Also for a range that is empty, since there was no gap: the end is looked up by it.
        self._ends[own[0]] = end if own[0] == start else own[0]
        self._expected[own[0] : self._ends[own[0]]] = True
        held += own
        return len(known)

    def grow(self, held: list[int], tokens: int) -> bool:
        """Extend blocks that `begin` gave to hold `tokens` positions; False if there are too few.

        Args:
            held: Blocks of the sequence; extended in place.
            tokens: Positions that it needs now.
        """
        missing = self.missing(held, tokens)
        if missing > self.num_free:
            return False
        if missing:
            own = self._following(held[-1] + 1, self._ends[self._first_own(held)], missing)
            held += own + self._anywhere(missing - len(own))
        return True

    def name(self, block: int, name: bytes) -> None:
        """A held block is full: sequences that begin alike may share it from now on.

        Where another block has the same content already, that one keeps the name.
        """
        if name not in self._block_of and block not in self._name_of:
            self._block_of[name] = block
            self._name_of[block] = name

    def release(self, held: list[int]) -> None:
        """Take back all blocks of a sequence; those with a name are kept for others."""
        if held:
            first = self._first_own(held)
            self._expected[first : self._ends.pop(first)] = False
        # From the end: a beginning is used by more sequences than what follows it.
        for block in reversed(held):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            self.num_free += 1
            if block in self._name_of:
                self._kept[block] = None
            else:
                self._free[block] = True
        held.clear()

    def _first_own(self, held: list[int]) -> int:
        """First block that a sequence did not find by name."""
        # Shared ones, which may be the first of another sequence, come before it.
        return next(block for block in reversed(held) if block in self._ends)

    def _range(self, after: int | None, count: int) -> tuple[int, int]:
        """Range for a new sequence, of `count` blocks that are free and that nobody expects.

        What follows the blocks it shares, or the smallest gap that is large enough, or else the
        largest one.
        """
        spare = self._free & ~self._expected
        if after is not None and np.count_nonzero(spare[after : after + count]) == count:
            return after, after + count
        edges = np.flatnonzero(np.diff(spare, prepend=False, append=False))
        if not len(edges):
            return self.num_blocks, self.num_blocks
        starts, sizes = edges[::2], np.diff(edges)[::2]
        fits = np.flatnonzero(sizes >= count)
        chosen = fits[sizes[fits].argmin()] if len(fits) else sizes.argmax()
        start = int(starts[chosen])
        return start, start + min(count, int(sizes[chosen]))

    def _following(self, start: int, own_end: int, missing: int) -> list[int]:
        """Take at most `missing` free blocks from `start` on, of one's own range or of nobody's."""
        taken = []
        for block in range(start, min(start + missing, self.num_blocks)):
            if not self._free[block] or (self._expected[block] and block >= own_end):
                break
            taken.append(block)
        self._take(taken)
        return taken

    def _anywhere(self, count: int) -> list[int]:
        """Take blocks that nobody expects to need, then those that somebody does."""
        if not count:
            return []
        self._make_room(count)
        unexpected = np.flatnonzero(self._free & ~self._expected)[:count]
        expected = np.flatnonzero(self._free & self._expected)[: count - len(unexpected)]
        taken = [*unexpected.tolist(), *expected.tolist()]
        self._take(taken)
        return taken

    def _make_room(self, count: int) -> None:
        """Give up kept blocks until as many are free that nobody expects to need."""
        spare = int(np.count_nonzero(self._free & ~self._expected))
        while self._kept and spare < count:
            spare += not self._expected[self._give_up()]

    def _give_up(self) -> int:
        """Free the kept block that was not used for longest."""
        block, _ = self._kept.popitem(last=False)
        del self._block_of[self._name_of.pop(block)]
        self._free[block] = True
        return block

    def _take(self, blocks: list[int]) -> None:
        self._free[blocks] = False
        self._holders.update(blocks)
        self.num_free -= len(blocks)
