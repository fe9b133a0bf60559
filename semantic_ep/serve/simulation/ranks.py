"""One simulated rank: the sequences that it runs, as the engine's batcher would."""

from __future__ import annotations

import dataclasses
import heapq
from collections import deque

import numpy as np

from semantic_ep.serve.stats import RankLoad


@dataclasses.dataclass(kw_only=True, eq=False)
class Job:
    """A request on a rank.

    Attributes:
        index: Of the request.
        prompt_tokens: Its length.
        new_tokens: Tokens that it will generate.
        routing_2LG: Hits and activations of one of its tokens, by layer and rank.
        left: Prompt tokens still to be computed.
    """

    index: int
    prompt_tokens: int
    new_tokens: int
    routing_2LG: np.ndarray
    left: int

    @property
    def kv_tokens(self) -> int:
        """KV positions that it needs in the end."""
        return self.prompt_tokens + self.new_tokens


class SimulatedRank:
    """Sequences of one rank, in order of arrival.

    A sequence starts when the whole of it fits into the KV cache, so that none is ever pre-empted.

    Args:
        shape_2LG: Shape of a request's routing: hits and activations, by layer and rank.
        kv_tokens: Positions of the KV cache.
        max_sequences: Sequences that run together.
        max_step_tokens: Tokens of a step: decoding sequences, then chunks of prompts.

    Attributes:
        decoding: Sequences that generate one token a step.
        decode_2LG: Their hits and activations, summed.
        kv_read: KV positions that a decode step reads.
        kv_reserved: KV positions set aside for running sequences.
        changed: Whether the decoding sequences have changed since `changed` was reset.
    """

    def __init__(
        self,
        shape_2LG: tuple[int, int, int],
        *,
        kv_tokens: int,
        max_sequences: int,
        max_step_tokens: int,
    ) -> None:
        self.decoding = self.kv_read = self.kv_reserved = 0
        self.decode_2LG = np.zeros(shape_2LG)
        self.changed = True
        self._kv_tokens = kv_tokens
        self._max_sequences = max_sequences
        self._max_step_tokens = max_step_tokens
        self._waiting: deque[Job] = deque()
        self._prefilling: deque[Job] = deque()
        self._ends: list[tuple[int, int, Job]] = []  # (step after which it ends, index, job)

    def add(self, job: Job) -> None:
        """Queue a request."""
        self._waiting.append(job)

    def start(self) -> list[Job]:
        """Start what fits, in order; returns what was started."""
        started: list[Job] = []
        while self._waiting and len(self._prefilling) + self.decoding < self._max_sequences:
            job = self._waiting[0]
            if self.kv_reserved + job.kv_tokens > self._kv_tokens:
                break
            self.kv_reserved += job.kv_tokens
            self._prefilling.append(self._waiting.popleft())
            started.append(job)
        return started

    def chunks(self) -> list[tuple[Job, int]]:
        """Prompt tokens of the next step, by request."""
        budget = self._max_step_tokens - self.decoding
        taken = []
        for job in self._prefilling:
            if budget <= 0:
                break
            count = min(job.left, budget)
            taken.append((job, count))
            budget -= count
        return taken

    def prefilled(self, job: Job, *, step: int) -> None:
        """The prompt is computed and the first token out; decoding goes on in the next steps."""
        self._prefilling.remove(job)
        self.decoding += 1
        self.kv_read += job.prompt_tokens
        self.decode_2LG += job.routing_2LG
        self.changed = True
        heapq.heappush(self._ends, (step + job.new_tokens - 1, job.index, job))

    def next_end(self) -> int | None:
        """Step after which the next decoding sequence ends."""
        return self._ends[0][0] if self._ends else None

    def ended(self, step: int) -> list[Job]:
        """Take out the sequences that end with this step."""
        done = []
        while self._ends and self._ends[0][0] <= step:
            job = heapq.heappop(self._ends)[2]
            self.decoding -= 1
            self.kv_read -= job.kv_tokens - 1  # The last token is never read.
            self.kv_reserved -= job.kv_tokens
            self.decode_2LG -= job.routing_2LG
            self.changed = True
            done.append(job)
        if not self.decoding:
            # Sums of many additions and subtractions drift.
            self.decode_2LG[:] = 0
        return done

    def load(self) -> RankLoad:
        """What the scheduler is told."""
        return RankLoad(
            running=len(self._prefilling) + self.decoding,
            waiting=len(self._waiting),
            pending_tokens=sum(job.left for job in self._prefilling)
            + sum(job.left for job in self._waiting),
            kv_tokens_used=self.kv_reserved,
            kv_tokens_total=self._kv_tokens,
        )
