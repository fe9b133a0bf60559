"""What the prefix cache of the serving engine costs and saves.

Two loads, all requests at once: prompts that share nothing, where a cache can only cost, and the
same prompts behind one of a few common beginnings. Each is served without the cache, with it, and
with it and a scheduler that knows what ranks have, in turn in one run; greedy tokens must be equal.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.registry import Chart, Result, Row, Table
from semantic_ep.errors import BackendError, ConfigError, explain

if TYPE_CHECKING:
    from benchmarks.serve_ranks import Served
    from semantic_ep.serve.engine import SemanticInferenceEngine

OFF, ON, KNOWN = "no cache", "cache", "cache, scheduler knows"
POLICY = {OFF: "least-loaded", ON: "least-loaded", KNOWN: "prefix-only"}
APART, SHARED = "nothing shared", "common beginnings"
_BLOCK_SIZE = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the theme's flags."""
    from benchmarks.serve_inputs import add_input_arguments

    add_input_arguments(parser)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4], metavar="G")
    parser.add_argument("--requests", type=int, default=0, help="drawn from the prompts; 0: all")
    parser.add_argument("--max-prompt-tokens", type=int, default=192, help="longer ones are cut")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--max-sequences", type=int, default=4, help="of a rank at a time")
    parser.add_argument("--beginnings", type=int, default=4, help="that requests share")
    parser.add_argument("--beginning-tokens", type=int, default=256, help="of each of them")
    parser.add_argument("--rounds", type=int, default=5, help="of every cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="a tiny random model with planted routing"
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """What all ranks are told.

    Attributes:
        model: Hugging Face checkpoint.
        loads: Prompts by name.
        max_new_tokens: Of each request.
        max_sequences: That run together on a rank.
        rounds: Of every cell.
    """

    model: Path
    loads: Mapping[str, Sequence[Sequence[int]]]
    max_new_tokens: int
    max_sequences: int
    rounds: int

    @property
    def kv_cache_tokens(self) -> int:
        """Positions of a rank's KV cache: twice what runs, so that as much again is kept."""
        longest = max(len(prompt) for prompts in self.loads.values() for prompt in prompts)
        return 2 * self.max_sequences * (longest + self.max_new_tokens + _BLOCK_SIZE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """All requests of a load, served once by one cell.

    Attributes:
        load, cache: The cell.
        requests: As their clients saw them.
        cpu_seconds: Of all ranks.
    """

    load: str
    cache: str
    requests: list[Served]
    cpu_seconds: float


def run(args: argparse.Namespace) -> Result:
    """Serve every cell on every number of ranks.

    Raises:
        ConfigError: A flag or file is wrong.
        BackendError: Tokens differ between the cells of a load.
    """
    for name in ("max_new_tokens", "max_sequences", "beginnings", "beginning_tokens", "rounds"):
        if getattr(args, name) < 1:
            where = f"--{name.replace('_', '-')}"
            raise ConfigError(
                explain("too small", where=where, got=getattr(args, name), allowed="1 or more")
            )
    if not args.quick:
        from benchmarks.serve_inputs import read_inputs

        inputs = read_inputs(args)
        return _measure(args, inputs.model, inputs.prompts, inputs.source)
    from benchmarks.serve_inputs import planted_inputs

    args.max_new_tokens, args.rounds, args.max_sequences = 4, 1, 1
    args.beginnings, args.beginning_tokens = 1, 40
    with tempfile.TemporaryDirectory() as directory:
        inputs = planted_inputs(Path(directory), requests=8, seed=args.seed)
        return _measure(args, inputs.model, inputs.prompts, inputs.source)


def _measure(
    args: argparse.Namespace, model: Path, prompts: Sequence[Sequence[int]], source: str
) -> Result:
    from benchmarks.gloo_ranks import on_ranks

    job = Job(
        model=model,
        loads={
            APART: prompts,
            SHARED: behind_beginnings(prompts, args.beginnings, args.beginning_tokens),
        },
        max_new_tokens=args.max_new_tokens,
        max_sequences=args.max_sequences,
        rounds=args.rounds,
    )
    rows = []
    for ranks in args.ranks:
        runs: list[Run] = on_ranks(serve_all, ranks, job)
        check_tokens(runs)
        rows += rows_of(runs, job, ranks)
    return Result(
        theme="serve_prefix",
        protocol=_protocol(args, source, job),
        rows=rows,
        tables=[_table(rows)],
        charts=[_chart(rows, ranks) for ranks in args.ranks],
    )


def behind_beginnings(prompts: Sequence[Sequence[int]], count: int, tokens: int) -> list[list[int]]:
    """Prompts in turn behind `count` beginnings, which are made of the prompts themselves."""
    beginnings = [
        list(itertools.islice(itertools.cycle(itertools.chain(*prompts[number::count])), tokens))
        for number in range(min(count, len(prompts)))
    ]
    return [
        [*beginnings[number % len(beginnings)], *prompt] for number, prompt in enumerate(prompts)
    ]


def serve_all(job: Job) -> list[Run] | None:
    """Serve every cell in every round; every rank calls this. The runs are rank 0's."""
    import torch.distributed as dist

    from semantic_ep.apply.checkpoint import checkpoint_fingerprint
    from semantic_ep.plan.placement import Placement
    from semantic_ep.serve.engine import SemanticInferenceEngine

    shape = checkpoint_fingerprint(job.model)
    engine = SemanticInferenceEngine.from_checkpoint(
        job.model,
        placement=Placement.contiguous(
            num_layers=shape.num_layers,
            num_experts=shape.num_experts,
            ep_size=dist.get_world_size(),
        ),
        group=dist.group.WORLD,
    )
    cells = list(itertools.product(job.loads, POLICY))
    for load, cache in cells[: len(POLICY)]:  # Everything once before anything counts.
        _serve(engine, job, load, cache)
    runs = []
    for number in range(job.rounds):
        for load, cache in cells if number % 2 == 0 else reversed(cells):
            runs.append(_serve(engine, job, load, cache))
    return runs if dist.get_rank() == 0 else None


def _serve(engine: SemanticInferenceEngine, job: Job, load: str, cache: str) -> Run:
    """Serve all requests of a load once, with an empty cache at first; every rank calls this."""
    import time

    import torch
    import torch.distributed as dist

    from benchmarks.serve_ranks import on_time
    from semantic_ep.serve.protocol import Engine
    from semantic_ep.serve.scheduling.make import make_scheduler
    from semantic_ep.serve.start import serve_group

    prompts, served = job.loads[load], []

    def front(running: Engine) -> None:
        served.extend(on_time(running, prompts, job.max_new_tokens, [0.0] * len(prompts)))

    dist.barrier()
    start = time.process_time()
    serve_group(
        engine,
        scheduler=make_scheduler(
            POLICY[cache],
            ep_size=dist.get_world_size(),
            max_sequences=job.max_sequences,
            prefix_block_size=_BLOCK_SIZE,
            prefix_tokens_per_rank=job.kv_cache_tokens if cache == KNOWN else 0,
        ),
        front=front,
        kv_cache_tokens=job.kv_cache_tokens,
        block_size=_BLOCK_SIZE,
        max_sequences=job.max_sequences,
        prefix_cache=cache != OFF,
    )
    spent = torch.tensor(time.process_time() - start)
    dist.all_reduce(spent)
    return Run(load=load, cache=cache, requests=served, cpu_seconds=float(spent))


def check_tokens(runs: Sequence[Run]) -> None:
    """Raise unless all runs of a load generated the same tokens.

    Raises:
        BackendError: They did not, or a request ended early.
    """
    expected: dict[str, list[list[int]]] = {}
    for one in runs:
        tokens = [request.tokens for request in one.requests]
        ended = all(request.end in ("stop", "length") for request in one.requests)
        if expected.setdefault(one.load, tokens) != tokens or not ended:
            raise BackendError(
                explain(
                    "served tokens differ with the prefix cache",
                    where=f"{one.load}, {one.cache}",
                    allowed="equal tokens in every cell of a load",
                )
            )


def rows_of(runs: Sequence[Run], job: Job, ranks: int) -> list[dict[str, Any]]:
    """One row a cell: medians of rounds, and what they are of the cell without a cache."""
    rows: list[dict[str, Any]] = []
    base: dict[str, Any] = {}
    for load, cache in itertools.product(job.loads, POLICY):
        same = [one for one in runs if (one.load, one.cache) == (load, cache)]
        prompt_tokens = sum(map(len, job.loads[load]))
        first = [1e3 * request.times[0] for one in same for request in one.requests]
        row = {
            "ranks": ranks,
            "load": load,
            "cache": cache,
            "policy": POLICY[cache],
            "n": len(same),
            "cached_share": statistics.mean(
                sum(request.cached for request in one.requests) / prompt_tokens for one in same
            ),
            "seconds": statistics.median(
                max(request.times[-1] for request in one.requests) for one in same
            ),
            "cpu_seconds": statistics.median(one.cpu_seconds for one in same),
            "ttft_p50_ms": float(np.percentile(first, 50)),
            "ttft_p99_ms": float(np.percentile(first, 99)),
            "same_tokens": True,
        }
        if cache == OFF:
            base = row
        for name in ("seconds", "cpu_seconds"):
            row[f"{name}_of_no_cache"] = row[name] / base[name]
        rows.append(row)
    return rows


def _table(rows: Sequence[Row]) -> Table:
    shown = {
        "ranks": "ranks",
        "load": "load",
        "cache": "cache",
        "cached_share": "prompt tokens found",
        "seconds_of_no_cache": "time of no cache",
        "cpu_seconds_of_no_cache": "CPU of no cache",
        "ttft_p50_ms": "TTFT p50, ms",
        "ttft_p99_ms": "TTFT p99, ms",
    }
    return Table(
        title="All requests at once, an empty cache at first; medians of rounds",
        rows=[{label: row[key] for key, label in shown.items()} for row in rows],
    )


def _chart(rows: Sequence[Row], ranks: int) -> Chart:
    return Chart(
        title=f"{ranks} ranks: CPU time, of that without a cache",
        kind="bars",
        rows=[row for row in rows if row["ranks"] == ranks],
        x="load",
        y="cpu_seconds_of_no_cache",
        series="cache",
        y_label="of no cache",
    )


def _protocol(args: argparse.Namespace, source: str, job: Job) -> dict[str, Any]:
    return {
        "source": source,
        "ranks": f"{args.ranks}, gloo on one machine, one thread each, attention-DP, contiguous "
        "experts, float32",
        "requests": len(job.loads[APART]),
        "prompt_tokens": {load: sum(map(len, prompts)) for load, prompts in job.loads.items()},
        SHARED: f"each prompt behind one of {args.beginnings} beginnings of "
        f"{args.beginning_tokens} tokens, which are made of the prompts, in turn",
        "max_new_tokens": args.max_new_tokens,
        "max_sequences": args.max_sequences,
        "kv_cache_tokens": f"{job.kv_cache_tokens} a rank: twice what runs",
        "policies": POLICY,
        "baseline": OFF,
        "rounds": args.rounds,
        "order": "every cell in every round, each round in the reverse order of the one before",
        "cpu_seconds": "of all ranks' processes, start and end of serving included",
        "parity": "equal greedy tokens in every cell of a load; else the run fails",
        "seed": args.seed,
    }
