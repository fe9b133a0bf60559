"""Replay requests through a scheduler on simulated ranks, in predicted time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from semantic_ep.plan.cost import link_seconds
from semantic_ep.serve.protocol import EngineRequest, RequestScheduler
from semantic_ep.serve.scheduling.cost import ServingCost
from semantic_ep.serve.scheduling.prefix import Prefix, PrefixIndex, blocks_of
from semantic_ep.serve.simulation.ranks import Job, SimulatedRank
from semantic_ep.serve.simulation.routing import RequestRouting

# Decode steps between two events pass at once, this many at most: their KV cache grows meanwhile.
_MAX_LEAP = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrival:
    """A request to come.

    Attributes:
        seconds: When.
        request: What the scheduler sees.
        new_tokens: What it will generate, which the scheduler does not see.
    """

    seconds: float
    request: EngineRequest
    new_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankLimits:
    """Bounds of every rank.

    Attributes:
        kv_tokens: Positions of the KV cache for running sequences.
        max_sequences: Sequences that run together.
        max_step_tokens: Tokens of a step.
        prefix_tokens: Tokens of the prefix cache; 0: none.
        prefix_block_size: Tokens of one of its blocks.
    """

    kv_tokens: int = 65_536
    max_sequences: int = 64
    max_step_tokens: int = 2048
    prefix_tokens: int = 65_536
    prefix_block_size: int = 64


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Replay:
    """What happened to R requests, by request.

    Attributes:
        arrived, assigned, first_token, ended: [R] float64, seconds.
        rank: [R] int64.
        prompt_tokens, cached_tokens, new_tokens: [R] int64.
        local_activations: [R] float64, share of the request's activations on its rank.
        remote_copies: [R] float64, a token, mean over layers.
        steps: Lockstep steps.
        transfer_seconds: Time of all steps in dispatch and combine.
    """

    arrived: np.ndarray
    assigned: np.ndarray
    first_token: np.ndarray
    ended: np.ndarray
    rank: np.ndarray
    prompt_tokens: np.ndarray
    cached_tokens: np.ndarray
    new_tokens: np.ndarray
    local_activations: np.ndarray
    remote_copies: np.ndarray
    steps: int
    transfer_seconds: float


def replay(
    arrivals: Sequence[Arrival],
    scheduler: RequestScheduler,
    routing: RequestRouting,
    cost: ServingCost,
    limits: RankLimits,
) -> Replay:
    """Serve all requests; the same arguments give the same result.

    Ranks step together. A step takes the compute of the fullest rank, reading the KV cache of the
    fullest rank, in each layer the experts of the busiest rank, and dispatch and combine of each
    layer as `link_seconds` has it. Computing and reading weights overlap; the rest does not.

    Args:
        arrivals: In order of time.
        scheduler: Fresh.
        routing: Of the same requests, under the placement served.
        cost: Of the model on its ranks.
        limits: Of every rank.
    """
    return _Simulation(arrivals, scheduler, routing, cost, limits).run()


class _Simulation:
    def __init__(
        self,
        arrivals: Sequence[Arrival],
        scheduler: RequestScheduler,
        routing: RequestRouting,
        cost: ServingCost,
        limits: RankLimits,
    ) -> None:
        self.arrivals, self.scheduler, self.cost = arrivals, scheduler, cost
        self.routing_R2LG = np.stack([routing.hits_RLG, routing.activations_RLG], axis=1)
        self.ranks = [
            SimulatedRank(
                self.routing_R2LG.shape[1:],
                kv_tokens=limits.kv_tokens,
                max_sequences=limits.max_sequences,
                max_step_tokens=limits.max_step_tokens,
            )
            for _ in range(cost.ep_size)
        ]
        self.prefixes = None
        self.beginnings: list[Prefix] = []
        if limits.prefix_tokens:
            self.prefixes = PrefixIndex(
                ep_size=cost.ep_size,
                block_size=limits.prefix_block_size,
                tokens_per_rank=limits.prefix_tokens,
            )
            self.beginnings = [
                blocks_of(a.request.prompt_token_ids, limits.prefix_block_size) for a in arrivals
            ]
        self.index_of = {a.request.id: index for index, a in enumerate(arrivals)}
        requests = len(arrivals)
        self.arrived = np.array([a.seconds for a in arrivals])
        self.assigned, self.first_token, self.ended = np.zeros((3, requests))
        self.rank = np.zeros(requests, dtype=np.int64)
        self.cached = np.zeros(requests, dtype=np.int64)
        self.now, self.step, self.transfer, self.came = 0.0, 0, 0.0, 0
        self._decode_seconds = (0.0, 0.0)

    def run(self) -> Replay:
        while True:
            self._arrive()
            for rank, simulated in enumerate(self.ranks):
                for job in simulated.start():
                    self._look_up_prefix(job, rank)
            chunks = [rank.chunks() for rank in self.ranks]
            if any(chunks) or any(rank.decoding for rank in self.ranks):
                self._advance(chunks)
            elif self.came < len(self.arrivals):
                self.now = max(self.now, float(self.arrived[self.came]))
            else:
                assert not len(self.scheduler), "idle ranks, and yet a request waits"
                return self._result()

    def _arrive(self) -> None:
        while self.came < len(self.arrivals) and self.arrived[self.came] <= self.now:
            arrival = self.arrivals[self.came]
            self.scheduler.add(arrival.request, now=arrival.seconds)
            self.came += 1
        if not len(self.scheduler):
            return
        loads = [rank.load() for rank in self.ranks]
        for assignment in self.scheduler.assign(loads, now=self.now):
            index = self.index_of[assignment.request_id]
            prompt = len(self.arrivals[index].request.prompt_token_ids)
            self.assigned[index], self.rank[index] = self.now, assignment.rank
            self.ranks[assignment.rank].add(
                Job(
                    index=index,
                    prompt_tokens=prompt,
                    new_tokens=self.arrivals[index].new_tokens,
                    routing_2LG=self.routing_R2LG[index],
                    left=prompt,
                )
            )

    def _look_up_prefix(self, job: Job, rank: int) -> None:
        if self.prefixes is not None:
            cached = int(self.prefixes.cached_tokens(self.beginnings[job.index])[rank])
            self.cached[job.index] = cached
            job.left -= cached

    def _advance(self, chunks: list[list[tuple[Job, int]]]) -> None:
        steps = 1
        if any(chunks):
            seconds = self._step_seconds(chunks)
        else:
            if any(rank.changed for rank in self.ranks):
                self._decode_seconds = self._composition_seconds(chunks)
                for rank in self.ranks:
                    rank.changed = False
            seconds = self._decode_seconds[0] + self._kv_seconds()
            self.transfer += self._decode_seconds[1]
            steps = self._leap(seconds)
            self.transfer += (steps - 1) * self._decode_seconds[1]
        self.now += steps * seconds
        self.step += steps
        for number, simulated in enumerate(self.ranks):
            simulated.kv_read += steps * simulated.decoding
            for job, count in chunks[number]:
                job.left -= count
                if not job.left:
                    self._prefilled(job, simulated, number)
            for job in simulated.ended(self.step):
                self.ended[job.index] = self.now
                self.scheduler.finished(
                    self.arrivals[job.index].request.id, new_tokens=job.new_tokens
                )

    def _prefilled(self, job: Job, simulated: SimulatedRank, rank: int) -> None:
        self.first_token[job.index] = self.now
        simulated.prefilled(job, step=self.step)
        if self.prefixes is not None:
            self.prefixes.insert(self.beginnings[job.index], rank)

    def _leap(self, seconds: float) -> int:
        """Decode steps until the next request ends or arrives."""
        ends = [end for rank in self.ranks if (end := rank.next_end()) is not None]
        steps = min(min(ends) - self.step, _MAX_LEAP)
        if len(self.scheduler):
            return 1
        if self.came < len(self.arrivals):
            gap = float(self.arrived[self.came]) - self.now
            steps = min(steps, int(np.ceil(gap / seconds)))
        return max(steps, 1)

    def _step_seconds(self, chunks: list[list[tuple[Job, int]]]) -> float:
        seconds, transfer = self._composition_seconds(chunks)
        self.transfer += transfer
        return seconds + self._kv_seconds()

    def _kv_seconds(self) -> float:
        return max(rank.kv_read for rank in self.ranks) * self.cost.seconds_per_kv_token

    def _composition_seconds(self, chunks: list[list[tuple[Job, int]]]) -> tuple[float, float]:
        """Seconds of a step without reading the KV cache, and the transfers among them."""
        cost = self.cost
        batch_G2LG = np.stack([rank.decode_2LG for rank in self.ranks])
        tokens_G = [rank.decoding for rank in self.ranks]
        for rank, taken in enumerate(chunks):
            for job, count in taken:
                batch_G2LG[rank] += count * job.routing_2LG
                tokens_G[rank] += count
        dense = max(max(tokens_G) * cost.seconds_per_dense_token, cost.dense_weight_seconds)
        busiest_L = batch_G2LG[:, 1].sum(axis=0).max(axis=1)
        experts = np.maximum(
            busiest_L * cost.seconds_per_activation, cost.expert_weight_seconds
        ).sum()
        rows_LGG = batch_G2LG[:, 0].transpose(1, 0, 2)
        transfer = link_seconds(rows_LGG, cost.topology, row_bytes=cost.row_bytes)
        overhead = cost.accelerator.step_overhead_microseconds * 1e-6
        return overhead + dense + float(experts) + transfer, transfer

    def _result(self) -> Replay:
        index = np.arange(len(self.arrivals))
        home_R2L = self.routing_R2LG[index, :, :, self.rank]
        total_R2L = self.routing_R2LG.sum(axis=3)
        return Replay(
            arrived=self.arrived,
            assigned=self.assigned,
            first_token=self.first_token,
            ended=self.ended,
            rank=self.rank,
            prompt_tokens=np.array([len(a.request.prompt_token_ids) for a in self.arrivals]),
            cached_tokens=self.cached,
            new_tokens=np.array([a.new_tokens for a in self.arrivals]),
            local_activations=(home_R2L[:, 1] / total_R2L[:, 1]).mean(axis=1),
            remote_copies=(total_R2L[:, 0] - home_R2L[:, 0]).mean(axis=1),
            steps=self.step,
            transfer_seconds=self.transfer,
        )
