"""The queue on rank 0: requests wait for a rank with room, and for a bounded time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from semantic_ep.plan.schedule import Schedule
from semantic_ep.serve.protocol import Assignment, EngineRequest
from semantic_ep.serve.scheduling.affinity import RankHits
from semantic_ep.serve.scheduling.policies import Candidate, GroupLoad, Policy
from semantic_ep.serve.scheduling.prefix import Prefix, PrefixIndex, stretches_of
from semantic_ep.serve.stats import RankLoad

# Weight of the latest request in the mean of generated tokens.
_NEWEST = 0.05
_NO_PREFIX = Prefix()


@dataclasses.dataclass(kw_only=True, eq=False)
class _Queued:
    request: EngineRequest
    since: float
    hits_G: np.ndarray | None
    new_hits_G: np.ndarray | None
    prefix: Prefix


@dataclasses.dataclass(frozen=True, kw_only=True)
class _HandedOver:
    rank: int
    kv_tokens: float


class Scheduler:
    """A `RequestScheduler`: hands a request to the cheapest rank that has room for it.

    A rank has room while its unfinished requests, with what they are expected to generate, fit
    into its KV cache and its batch. Until then a request waits here, where it can still choose,
    and requests behind it that fit may pass. After `max_wait_seconds` it goes to the rank that the
    policy likes best among those with the fewest requests, and nobody passes it any more: a rank
    serves what it was handed in order.

    Args:
        policy: Costs of the ranks.
        ep_size: Number of EP ranks (G).
        hits: Table of the plan in use; None: policies see no experts.
        decode_hits: Of the plan for generated tokens, if they have one of their own.
        prefixes: What ranks have cached; None: they cache nothing.
        max_sequences: Requests that a rank runs together.
        max_wait_seconds: Bound of the wait in this queue.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        ep_size: int,
        hits: RankHits | None = None,
        decode_hits: RankHits | None = None,
        prefixes: PrefixIndex | None = None,
        max_sequences: int = 32,
        max_wait_seconds: float = 2.0,
    ) -> None:
        self._policy = policy
        self._hits = hits
        self._decode_hits = decode_hits
        self._prefixes = prefixes
        self._max_sequences = max_sequences
        self._max_wait = max_wait_seconds
        self._queue: dict[str, _Queued] = {}
        self._handed_over: dict[str, _HandedOver] = {}
        self._kv_G = np.zeros(ep_size)
        self._kv_total_G: np.ndarray | None = None
        self._nothing_G = np.zeros(ep_size, dtype=np.int64)
        self._mean_new_tokens: float | None = None

    def add(self, request: EngineRequest, *, now: float) -> None:
        """See `RequestScheduler`. The prompt is looked up here, once."""
        ids = request.prompt_token_ids
        hits_G, new_hits_G = self._look_up(ids)
        self._queue[request.id] = _Queued(
            request=request,
            since=now,
            hits_G=hits_G,
            new_hits_G=new_hits_G,
            prefix=_NO_PREFIX
            if self._prefixes is None
            else stretches_of(ids, self._prefixes.block_size),
        )

    def remove(self, request_id: str) -> bool:
        """See `RequestScheduler`."""
        return self._queue.pop(request_id, None) is not None

    def assign(self, ranks: Sequence[RankLoad], *, now: float) -> list[Assignment]:
        """See `RequestScheduler`."""
        if not self._queue:
            return []
        load = self._load(ranks)
        free = np.inf  # Bound on what any rank has left; known once a request found no room.
        assigned = []
        for queued in list(self._queue.values()):
            overdue = now - queued.since >= self._max_wait
            prompt_tokens, new_tokens = self._tokens(queued.request)
            if prompt_tokens + new_tokens > free and not overdue:
                continue
            candidate = Candidate(
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                hits_G=queued.hits_G,
                new_hits_G=queued.new_hits_G,
                cached_G=self._nothing_G
                if self._prefixes is None
                else self._prefixes.cached_tokens(queued.prefix),
            )
            rank = self._choose(candidate, load, overdue=overdue)
            if rank is None:
                free = min(free, self._free_kv(load))
            else:
                load.add(candidate, rank)
                self._hand_over(queued, candidate, rank)
                assigned.append(Assignment(request_id=queued.request.id, rank=rank))
        return assigned

    def finished(self, request_id: str, *, new_tokens: int) -> None:
        """See `RequestScheduler`."""
        request = self._handed_over.pop(request_id, None)
        if request is None:
            return
        self._kv_G[request.rank] -= request.kv_tokens
        mean = new_tokens if self._mean_new_tokens is None else self._mean_new_tokens
        self._mean_new_tokens = mean + _NEWEST * (new_tokens - mean)

    def replan(self, schedule: Schedule, decode_schedule: Schedule | None = None) -> None:
        """See `RequestScheduler`. A policy that sees no experts goes on without."""
        if self._hits is None:
            return
        top_k = self._hits.top_k
        self._hits = RankHits.from_schedule(schedule, top_k=top_k)
        if decode_schedule is not None:
            self._decode_hits = RankHits.from_schedule(decode_schedule, top_k=top_k)
        for queued in self._queue.values():
            queued.hits_G, queued.new_hits_G = self._look_up(queued.request.prompt_token_ids)

    def __len__(self) -> int:
        """Queued requests."""
        return len(self._queue)

    def _look_up(self, ids: Sequence[int]) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Hits of a prompt, and of what it will generate, which is taken to resemble it."""
        if self._hits is None:
            return None, None
        hits_G = self._hits.of_prompt(ids)
        if self._decode_hits is None:
            return hits_G, hits_G
        return hits_G, self._decode_hits.of_prompt(ids)

    def _load(self, ranks: Sequence[RankLoad]) -> GroupLoad:
        if self._kv_total_G is None:  # It never changes.
            self._kv_total_G = np.array([rank.kv_tokens_total for rank in ranks])
        work_2G = np.empty((2, len(ranks)))
        # Faster than an array of lists: this runs once a decision.
        work_2G[0] = [rank.pending_tokens for rank in ranks]
        work_2G[1] = self._kv_G
        sequences = [rank.running + rank.waiting for rank in ranks]
        return GroupLoad(
            work_2G=work_2G,
            sequences_G=np.fromiter(sequences, np.int64, len(ranks)),
            kv_total_G=self._kv_total_G,
        )

    def _free_kv(self, load: GroupLoad) -> float:
        """Most KV positions that a rank with room in its batch has left; negative without one."""
        free_G = load.kv_total_G - load.kv_G
        return float(free_G.max(where=load.sequences_G < self._max_sequences, initial=-1.0))

    def _tokens(self, request: EngineRequest) -> tuple[int, float]:
        """Prompt tokens, and new tokens to expect."""
        limit, mean = request.sampling.max_tokens, self._mean_new_tokens
        return len(request.prompt_token_ids), limit if mean is None else min(limit, mean)

    def _choose(self, candidate: Candidate, load: GroupLoad, *, overdue: bool) -> int | None:
        needed = candidate.prompt_tokens + candidate.new_tokens
        costs_G = self._policy.costs(candidate, load)
        rank = int(costs_G.argmin())
        if self._has_room(rank, needed, load):  # Mostly; nobody else need be asked.
            return rank
        room_G = load.sequences_G < self._max_sequences
        room_G &= load.kv_G + needed <= load.kv_total_G
        if overdue and not room_G.any():
            room_G = load.sequences_G == load.sequences_G.min()
        costs_G = np.where(room_G, costs_G, np.inf)
        rank = int(costs_G.argmin())
        if costs_G[rank] < np.inf:
            return rank
        return int(room_G.argmax()) if overdue else None

    def _has_room(self, rank: int, needed: float, load: GroupLoad) -> bool:
        return bool(
            load.sequences_G[rank] < self._max_sequences
            and load.kv_G[rank] + needed <= load.kv_total_G[rank]
        )

    def _hand_over(self, queued: _Queued, candidate: Candidate, rank: int) -> None:
        request = queued.request
        del self._queue[request.id]
        self._policy.assigned(rank)
        kv_tokens = candidate.prompt_tokens + candidate.new_tokens
        self._kv_G[rank] += kv_tokens
        self._handed_over[request.id] = _HandedOver(rank=rank, kv_tokens=kv_tokens)
        if self._prefixes is not None:
            self._prefixes.insert(queued.prefix, rank)
