"""Continuous batching on one rank: which sequences run in the next step, with how many tokens.

Decoding sequences run in every step; what is left of the token budget goes to chunks of prompts,
oldest first. When blocks run out, the youngest sequence gives its up and is computed again later:
the oldest one always proceeds, so that every request ends. With a prefix cache a sequence starts
behind the blocks that others have filled with the same tokens.
"""

from __future__ import annotations

from collections import deque

from semantic_ep.serve.blocks import BlockPool
from semantic_ep.serve.sequences import Sequence
from semantic_ep.serve.stats import RankLoad


class Batcher:
    """Running and waiting sequences of one rank.

    Args:
        pool: Blocks of the KV cache.
        max_sequences: Sequences that run together.
        max_step_tokens: Tokens of a step, at least `max_sequences`.
        prefix_cache: Whether sequences share the full blocks of a common beginning.

    Attributes:
        preemptions: Times a sequence lost its blocks.
        prefix_queries: Prompt tokens of sequences that were started, each once; 0 without sharing.
        prefix_hits: Of these, found in blocks that were full already.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_sequences: int,
        max_step_tokens: int,
        prefix_cache: bool = False,
    ) -> None:
        self.pool = pool
        self.preemptions = self.prefix_queries = self.prefix_hits = 0
        self._prefix_cache = prefix_cache
        self._max_sequences = max_sequences
        self._max_step_tokens = max_step_tokens
        self._running: list[Sequence] = []  # by age
        self._waiting: deque[Sequence] = deque()

    def __bool__(self) -> bool:
        return bool(self._running or self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, whose prompt and output together fit into the pool."""
        self._waiting.append(sequence)

    def remove(self, request_id: str) -> Sequence | None:
        """Take out a sequence and free its blocks; None if it is not here."""
        for queue in (self._running, self._waiting):
            for sequence in queue:
                if sequence.request.id == request_id:
                    queue.remove(sequence)
                    self.pool.release(sequence.blocks)
                    return sequence
        return None

    def plan(self) -> list[tuple[Sequence, int]]:
        """Choose the sequences of the next step and how many tokens of each; takes their blocks."""
        step: dict[Sequence, int] = {}
        budget = self._max_step_tokens
        # The sort is stable: decoding sequences first, each kind by age.
        for sequence in sorted(self._running, key=lambda s: s.pending > 1):
            count = min(sequence.pending, budget)
            if count and sequence in self._running and self._take(sequence, count, step):
                step[sequence] = count
                budget -= count
        while budget and self._waiting and len(self._running) < self._max_sequences:
            sequence = self._waiting[0]
            if not self._start(sequence):
                break
            self._waiting.popleft()
            self._running.append(sequence)
            count = min(sequence.pending, budget)
            step[sequence] = count
            budget -= count
        return list(step.items())

    def advance(self, sequence: Sequence, count: int) -> None:
        """The step has computed this many tokens of a sequence."""
        size = self.pool.block_size
        full = sequence.computed // size
        sequence.computed += count
        if self._prefix_cache:
            names = sequence.block_names(sequence.computed // size, size)
            for block, name in zip(sequence.blocks[full:], names[full:]):
                self.pool.name(block, name)

    def load(self) -> RankLoad:
        """Sequences, pending prompt tokens and use of the cache."""
        everything = [*self._running, *self._waiting]
        used = self.pool.num_blocks - self.pool.num_free
        return RankLoad(
            running=len(self._running),
            waiting=len(self._waiting),
            pending_tokens=sum(s.pending for s in everything if s.pending > 1),
            kv_tokens_used=used * self.pool.block_size,
            kv_tokens_total=self.pool.capacity,
        )

    def _start(self, sequence: Sequence) -> bool:
        """Get blocks for the whole of a sequence, or it would soon be pre-empted."""
        size, names = self.pool.block_size, []
        if self._prefix_cache:
            # The last token is computed in any case: the next one follows from its output.
            names = sequence.block_names((len(sequence.tokens) - 1) // size, size)
        share = self.pool.capacity // self._max_sequences
        full = self.pool.begin(
            sequence.blocks,
            len(sequence.tokens),
            names=names,
            expected=min(sequence.longest, share),
        )
        if full is None:
            return False
        sequence.computed = full * size
        if self._prefix_cache and sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
            self.prefix_queries += len(sequence.tokens)
            self.prefix_hits += sequence.computed
        return True

    def _take(self, sequence: Sequence, count: int, step: dict[Sequence, int]) -> bool:
        """Get blocks for a sequence, from younger ones if need be; False if it was the youngest."""
        while not self.pool.grow(sequence.blocks, sequence.computed + count):
            victim = self._running.pop()
            step.pop(victim, None)
            self.pool.release(victim.blocks)
            victim.computed = 0
            self.preemptions += 1
            self._waiting.appendleft(victim)
            if victim is sequence:
                return False
        return True
