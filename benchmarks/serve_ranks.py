"""The ranks of the serve theme: every plan and policy serves the same requests, interleaved.

Each rank holds one engine a plan. A cell is a plan with a scheduling policy; it serves through
`serve_group`, the loop that the HTTP server runs on, and requests arrive at rank 0 when their time
has come, whatever is still being served.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.gloo_ranks import PEER_SECONDS
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.schedule import Schedule
from semantic_ep.runtime.collectives import from_all_ranks
from semantic_ep.serve.engine import SemanticInferenceEngine
from semantic_ep.serve.protocol import (
    Engine,
    EngineRequest,
    RequestScheduler,
    SamplingParams,
    TokenEvent,
)
from semantic_ep.serve.reference import generate_in_one_process
from semantic_ep.serve.scheduling.cost import Accelerator, ServingCost
from semantic_ep.serve.scheduling.make import make_scheduler
from semantic_ep.serve.scheduling.measured import measured_accelerator, serving_cost
from semantic_ep.serve.start import serve_group
from semantic_ep.topology import LINKS, Topology

BASELINE = ("contiguous", "round-robin")
BURST = math.inf
COUNTED = ("tokens", "activations", "local_activations", "remote_rows", "remote_bytes")
LINK = "shared_memory"
_BLOCK_SIZE = 16


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """What all ranks are told.

    Attributes:
        model: Hugging Face checkpoint, in logical expert order.
        placements, schedules: By plan.
        policies: Of scheduling.
        prompts: Token ids of all requests.
        max_new_tokens: Of each.
        loads: Requests a second in shares of the baseline's; `BURST`: all at once.
        rounds: Repetitions of every cell at every load.
        light_requests: Served one at a time by the baseline, for the objective.
        max_sequences: That run together on a rank.
        seed: Of the times between arrivals.
    """

    model: Path
    placements: Mapping[str, Placement]
    schedules: Mapping[str, Schedule]
    policies: Sequence[str]
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    loads: Sequence[float]
    rounds: int
    light_requests: int
    max_sequences: int
    seed: int

    @property
    def kv_cache_tokens(self) -> int:
        """Positions of a rank's KV cache: nobody is pre-empted."""
        longest = max(map(len, self.prompts)) + self.max_new_tokens
        return self.max_sequences * (longest + _BLOCK_SIZE)


@dataclasses.dataclass(kw_only=True)
class Served:
    """One request as its client saw it; seconds since the first could arrive.

    Attributes:
        arrived: When it was due, which is not later than when it was submitted.
        times: Of each new token.
        tokens: New tokens.
        rank: That served it.
        end: Finish reason.
        cached: Prompt tokens that the prefix cache had.
    """

    arrived: float
    times: list[float] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    rank: int = -1
    end: str = ""
    cached: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """All requests, served once by one cell.

    Attributes:
        plan, policy: The cell.
        load: See `Job.loads`.
        requests: In order of arrival.
        counted: `COUNTED`, summed over ranks and layers: payload of dispatch and combine that left
            its rank, rows of dispatch that did.
    """

    plan: str
    policy: str
    load: float
    requests: list[Served]
    counted: dict[str, int]

    @property
    def seconds(self) -> float:
        """From the first arrival to the last token."""
        ended = max(request.times[-1] for request in self.requests)
        return ended - min(request.arrived for request in self.requests)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What rank 0 brings back.

    Attributes:
        reference: New tokens of each request, by transformers in one process.
        light: The baseline with one request at a time.
        burst_rate: Requests a second of the baseline when all arrive at once.
        runs: Of every cell, load and round.
        accelerator: What the "semantic" policy was told of the machine.
    """

    reference: list[list[int]]
    light: Run
    burst_rate: float
    runs: list[Run]
    accelerator: Accelerator


def serve_all(job: Job) -> Measured | None:
    """Serve with every plan and policy; every rank calls this. The result is rank 0's."""
    group = dist.group.WORLD
    engines = {
        name: SemanticInferenceEngine.from_checkpoint(job.model, placement=placement, group=group)
        for name, placement in job.placements.items()
    }
    reference = _reference(job)
    accelerator = measured_accelerator()
    topology = Topology.uniform(dist.get_world_size(), intra_node=LINKS[LINK])
    cost = serving_cost(engines[BASELINE[0]], accelerator=accelerator, topology=topology)
    serve = functools.partial(_serve, job, engines, cost)
    for plan in engines:
        serve(plan, BASELINE[1], BURST, [0.0] * len(job.prompts))
    light = serve(*BASELINE, 0.0, None)
    burst = serve(*BASELINE, BURST, [0.0] * len(job.prompts))
    first = dist.get_rank() == 0
    burst_rate = len(job.prompts) / burst.seconds if first else 0.0
    runs = []
    for number, load, plan, policy in _cells(job):
        # Every cell of a round sees the same arrivals.
        due = _arrivals(len(job.prompts), load * burst_rate, job.seed + number) if first else None
        runs.append(serve(plan, policy, load, due))
    if not first:
        return None
    return Measured(
        reference=reference,
        light=light,
        burst_rate=burst_rate,
        runs=runs,
        accelerator=accelerator,
    )


def _cells(job: Job) -> Iterator[tuple[int, float, str, str]]:
    """(round, load, plan, policy), in turning order."""
    cells = list(itertools.product(job.placements, job.policies))
    for number in range(job.rounds):
        for load in job.loads:
            for plan, policy in cells if number % 2 == 0 else reversed(cells):
                yield number, load, plan, policy


def _arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds at which requests arrive: a Poisson process, or all at once."""
    gaps = np.random.default_rng(seed).exponential(1.0, size=count)
    due: list[float] = (np.cumsum(gaps) / rate).tolist()
    return due


def _serve(
    job: Job,
    engines: Mapping[str, SemanticInferenceEngine],
    cost: ServingCost,
    plan: str,
    policy: str,
    load: float,
    due: Sequence[float] | None,
) -> Run | None:
    """Serve all requests once; `due` counts on rank 0, None is one request after the other."""
    engine = engines[plan]
    served: list[Served] = []

    def front(running: Engine) -> None:
        if load == 0:
            served.extend(_one_by_one(running, job))
        else:
            assert due is not None
            served.extend(on_time(running, job.prompts, job.max_new_tokens, due))

    engine.model.dispatcher.stats.reset()
    dist.barrier()
    serve_group(
        engine,
        scheduler=_scheduler(job, cost, plan, policy),
        front=front,
        peer_timeout=PEER_SECONDS,
        kv_cache_tokens=job.kv_cache_tokens,
        block_size=_BLOCK_SIZE,
        max_sequences=job.max_sequences,
    )
    counted = _counted(engine)
    if not served:
        return None
    return Run(plan=plan, policy=policy, load=load, requests=served, counted=counted)


def _scheduler(job: Job, cost: ServingCost, plan: str, policy: str) -> RequestScheduler:
    return make_scheduler(
        policy,
        ep_size=cost.ep_size,
        schedule=job.schedules[plan],
        top_k=cost.model.top_k,
        cost=cost,
        max_sequences=job.max_sequences,
        prefix_block_size=_BLOCK_SIZE,
        # Ranks keep no prefixes: only the policy that is all about them is told otherwise.
        prefix_tokens_per_rank=job.kv_cache_tokens if policy == "prefix-only" else 0,
    )


def on_time(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    due: Sequence[float],
) -> list[Served]:
    """Submit each request when it is due, in seconds from now, and wait for all."""
    start = time.perf_counter()
    served = []
    for number, (prompt, at) in enumerate(zip(prompts, due, strict=True)):
        time.sleep(max(start + at - time.perf_counter(), 0.0))
        served.append(
            _submit(engine, prompt, max_new_tokens, number=number, arrived=at, start=start)
        )
    engine.drain().result()
    return served


def _one_by_one(engine: Engine, job: Job) -> list[Served]:
    """Submit the first few requests, each after the end of the one before."""
    import threading

    start = time.perf_counter()
    served = []
    for number, prompt in enumerate(job.prompts[: job.light_requests]):
        ended = threading.Event()
        served.append(
            _submit(
                engine,
                prompt,
                job.max_new_tokens,
                number=number,
                arrived=time.perf_counter() - start,
                start=start,
                on_end=ended.set,
            )
        )
        ended.wait()
    return served


def _submit(
    engine: Engine,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    number: int,
    arrived: float,
    start: float,
    on_end: Callable[[], object] | None = None,
) -> Served:
    served = Served(arrived=arrived)

    def take(event: TokenEvent) -> None:
        served.times += [time.perf_counter() - start] * len(event.token_ids)
        served.tokens += event.token_ids
        served.rank = max(served.rank, event.rank)
        served.cached = max(served.cached, event.cached_tokens)
        if event.finish_reason is not None:
            served.end = event.finish_reason
            if on_end is not None:
                on_end()

    request = EngineRequest(
        id=str(number),
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_new_tokens, temperature=0),
    )
    engine.submit(request, take)
    return served


def _counted(engine: SemanticInferenceEngine) -> dict[str, int]:
    """Counters since the reset, summed over ranks and layers."""
    stats = engine.model.dispatcher.stats
    found = stats.snapshot()

    def to_others(name: str) -> int:
        return int(found[name].sum() - found[name][:, stats.rank].sum())

    mine = {
        "tokens": int(found["tokens"].sum()),
        "activations": int(found["activations"].sum()),
        "local_activations": int(found["activations"][:, stats.rank].sum()),
        "remote_rows": to_others("rows_dispatch"),
        "remote_bytes": to_others("bytes_dispatch") + to_others("bytes_combine"),
    }
    total = torch.tensor([mine[name] for name in COUNTED])
    dist.all_reduce(total)
    return dict(zip(COUNTED, total.tolist(), strict=True))


def _reference(job: Job) -> list[list[int]]:
    """What transformers generates in one process; each rank does a share of the requests."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = generate_in_one_process(
        job.model,
        job.prompts[rank::ranks],
        max_new_tokens=job.max_new_tokens,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    everyone = from_all_ranks(mine, "gathering of the reference")
    return [everyone[number % ranks][number // ranks] for number in range(len(job.prompts))]
