"""Scheduler: which rank serves a request (attention-DP)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from semantic_ep.plan.requests import assign_requests
from semantic_ep.plan.schedule import Schedule
from semantic_ep.serve.protocol import Assignment, EngineRequest, RankLoad


def round_robin(num_requests: int, ep_size: int) -> np.ndarray:
    """[R] int64, requests dealt to ranks in order of arrival."""
    return np.arange(num_requests) % ep_size


def by_affinity(
    prompts: Sequence[Sequence[int]], schedule: Schedule, *, max_new_tokens: int
) -> np.ndarray:
    """[R] int64, requests on the ranks that hold the experts of their tokens.

    Tokens a rank are balanced first, the prompt and what may be generated counted together.

    Args:
        prompts: Token ids of each request.
        schedule: Of the plan that the experts are placed by.
        max_new_tokens: Tokens that each request may generate.
    """
    scores = [schedule.request_score(np.asarray(prompt)) for prompt in prompts]
    tokens = np.array([len(prompt) + max_new_tokens for prompt in prompts])
    return assign_requests(np.stack(scores), tokens)


class RoundRobin:
    """A `RequestScheduler` that deals requests to ranks in order of arrival, at once."""

    def __init__(self) -> None:
        self._queue: dict[str, EngineRequest] = {}
        self._next = 0

    def add(self, request: EngineRequest, *, now: float) -> None:
        """See `RequestScheduler`."""
        self._queue[request.id] = request

    def remove(self, request_id: str) -> bool:
        """See `RequestScheduler`."""
        return self._queue.pop(request_id, None) is not None

    def assign(self, ranks: Sequence[RankLoad], *, now: float) -> list[Assignment]:
        """See `RequestScheduler`."""
        start, self._next = self._next, self._next + len(self._queue)
        assigned = [
            Assignment(request_id=request_id, rank=(start + number) % len(ranks))
            for number, request_id in enumerate(self._queue)
        ]
        self._queue.clear()
        return assigned

    def finished(self, request_id: str, *, new_tokens: int) -> None:
        """See `RequestScheduler`."""

    def __len__(self) -> int:
        """Queued requests."""
        return len(self._queue)
