"""Request schedulers on simulated ranks: latency against load, and the time of a decision.

Replays arrivals of a public serving trace with public prompts through every scheduling policy, in
a discrete-event simulator driven by the cost model; what a step takes is predicted, not measured.
The time of a decision is measured, here.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.registry import Chart, Result, Row, Table
from benchmarks.serve_workload import (
    TRACES,
    Workload,
    build,
    read_arrivals,
    read_texts,
)
from semantic_ep.plan.schedule import Schedule
from semantic_ep.serve.protocol import EngineRequest, SamplingParams
from semantic_ep.serve.scheduling.affinity import SAMPLED_TOKENS
from semantic_ep.serve.scheduling.cost import Accelerator, ModelSize, ServingCost
from semantic_ep.serve.scheduling.make import make_scheduler
from semantic_ep.serve.simulation.metrics import Objective, summary
from semantic_ep.serve.simulation.routing import RequestRouting
from semantic_ep.serve.simulation.simulator import RankLimits, Replay, replay
from semantic_ep.serve.stats import RankLoad
from semantic_ep.topology import LINKS, Topology

# DeepSeek-V2-Lite, from its published configuration: multi-head latent attention, two shared
# experts, one dense layer and the head are dense; the KV cache holds 512 + 64 elements a layer.
MODEL = ModelSize(
    dense_parameters=1_100_000_000,
    expert_parameters=3 * 2048 * 1408,
    num_layers=26,
    num_experts=64,
    top_k=6,
    hidden_size=2048,
    kv_bytes_per_token=27 * (512 + 64) * 2,
)
# About 40 % of an H100's dense bf16 peak, and 75 % of its memory bandwidth.
ACCELERATOR = Accelerator(teraflops=400, gigabytes_per_second=2500, step_overhead_microseconds=2000)
# Share of the requests a second that contiguous placement with round-robin serves when all arrive
# at once. Its last few sequences leave most ranks idle, so that more is possible.
LOADS = (0.3, 0.6, 0.8, 1.0, 1.2, 1.5)
SLO_FACTOR = 5
LIMITS = RankLimits()

DECISION_RANKS = 64
DECISION_VOCABULARY = 129_280
DECISION_ROUNDS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """What is compared.

    Attributes:
        name: In rows and charts.
        placement: Placement policy.
        policy: Scheduling policy.
        experts, prefixes: Whether the scheduler sees the plan, and the prefix cache. The ranks
            cache prefixes in any case.
    """

    name: str
    placement: str
    policy: str
    experts: bool = True
    prefixes: bool = True


PLANNED = "semantic-requests"
BASELINE = Variant(name="contiguous, round-robin", placement="contiguous", policy="round-robin")
VARIANTS = (
    BASELINE,
    Variant(name="contiguous, least-loaded", placement="contiguous", policy="least-loaded"),
    Variant(name="round-robin", placement=PLANNED, policy="round-robin"),
    Variant(name="least-loaded", placement=PLANNED, policy="least-loaded"),
    Variant(name="prefix-only", placement=PLANNED, policy="prefix-only"),
    Variant(name="semantic-window", placement=PLANNED, policy="semantic-window"),
    Variant(name="semantic", placement=PLANNED, policy="semantic"),
    Variant(name="semantic, no prefixes", placement=PLANNED, policy="semantic", prefixes=False),
    Variant(name="semantic, no experts", placement=PLANNED, policy="semantic", experts=False),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the theme's flags."""
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), metavar="DIR",
        help="folder with serving/, prompts/, tokenizers/ and traces/ (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--arrivals", nargs="+", choices=list(TRACES), default=list(TRACES))
    parser.add_argument("--links", nargs="+", choices=sorted(LINKS), default=["pcie4", "nvlink4"])
    parser.add_argument("--ep", type=int, default=8, metavar="G", help="ranks, on one node")
    parser.add_argument("--requests", type=int, default=1500, help="requests to replay")
    parser.add_argument("--loads", type=float, nargs="+", default=list(LOADS))
    parser.add_argument("--profile-fraction", type=float, default=0.5, metavar="F")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything, 4 ranks")


def run(args: argparse.Namespace) -> Result:
    """Replay every variant at every load, and time decisions."""
    if args.quick:
        args.requests, args.loads, args.ep, args.profile_fraction = 100, [0.3, 1.5], 4, 0.2
        args.links, args.arrivals = args.links[:1], args.arrivals[:1]
    rows = list(_replays(args))
    decisions = decision_rows(20 if args.quick else 100)
    scenarios = list(dict.fromkeys((row["arrivals"], row["link"]) for row in rows))
    tables = [_table(rows, *scenario) for scenario in scenarios]
    tables.append(
        Table(
            title=f"time of a decision, µs: {DECISION_RANKS} ranks, {DECISION_VOCABULARY} token "
            "ids, one request at a time, semantic policy",
            rows=decisions,
        )
    )
    return Result(
        theme="serve_policies",
        protocol=_protocol(args),
        rows=[*rows, *decisions],
        tables=tables,
        charts=[chart for scenario in scenarios for chart in _charts(rows, *scenario)],
    )


def _replays(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from semantic_ep.observe.formats import read_npz_trace
    from semantic_ep.observe.profile import RoutingProfile
    from semantic_ep.plan.policies import policy

    trace = read_npz_trace(
        args.data / "traces" / "deepseek_v2_lite_chat.npz", num_experts=MODEL.num_experts
    )
    profiled, heldout = trace.split(args.profile_fraction, seed=args.seed)
    profile = RoutingProfile.from_trace(profiled)
    texts = read_texts(args.data, heldout, seed=args.seed)
    placements = {
        name: policy(name).place(profile, ep_size=args.ep, seed=args.seed)
        for name in dict.fromkeys(variant.placement for variant in VARIANTS)
    }
    schedules = {name: Schedule.from_profile(profile, one) for name, one in placements.items()}
    for arrivals in args.arrivals:
        recorded = read_arrivals(args.data, arrivals, limit=args.requests)
        workload = build(recorded, texts, seed=args.seed)
        routing = {
            name: RequestRouting.of(one, heldout, workload.positions)
            for name, one in placements.items()
        }
        for link in args.links:
            cost = ServingCost(
                model=MODEL,
                accelerator=ACCELERATOR,
                topology=Topology.uniform(args.ep, intra_node=LINKS[link]),
            )

            scenario = _Scenario(
                labels={"arrivals": arrivals, "link": link},
                workload=workload,
                routing=routing,
                schedules=schedules,
                cost=cost,
            )
            yield from scenario.rows(args.loads)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Scenario:
    """One workload on one topology.

    Attributes:
        labels: Of its rows.
        workload: Requests.
        routing: By placement.
        schedules: By placement.
        cost: Of the model on the topology.
    """

    labels: Row
    workload: Workload
    routing: Mapping[str, RequestRouting]
    schedules: Mapping[str, Schedule]
    cost: ServingCost

    def rows(self, loads: Sequence[float]) -> Iterator[dict[str, Any]]:
        """Every variant at every load, judged by one objective."""
        ranks = self.cost.ep_size
        burst = summary(self._replay(BASELINE, math.inf), ranks)["requests_per_second"]
        light = summary(self._replay(BASELINE, min(loads) * burst), ranks)
        objective = Objective(
            ttft_seconds=SLO_FACTOR * light["ttft_p50_ms"] / 1e3,
            tpot_seconds=SLO_FACTOR * light["tpot_p50_ms"] / 1e3,
        )
        for load in loads:
            for variant in VARIANTS:
                yield {
                    **self.labels,
                    "variant": variant.name,
                    "placement": variant.placement,
                    "policy": variant.policy,
                    "load": load,
                    "rate": load * burst,
                    "slo_ttft_ms": objective.ttft_seconds * 1e3,
                    "slo_tpot_ms": objective.tpot_seconds * 1e3,
                    **summary(self._replay(variant, load * burst), ranks, objective),
                }

    def _replay(self, variant: Variant, rate: float) -> Replay:
        scheduler = make_scheduler(
            variant.policy,
            ep_size=self.cost.ep_size,
            schedule=self.schedules[variant.placement] if variant.experts else None,
            top_k=MODEL.top_k,
            cost=self.cost,
            prefix_block_size=LIMITS.prefix_block_size,
            prefix_tokens_per_rank=LIMITS.prefix_tokens if variant.prefixes else 0,
            max_sequences=LIMITS.max_sequences,
        )
        routing = self.routing[variant.placement]
        return replay(self.workload.at_rate(rate), scheduler, routing, self.cost, LIMITS)


def decision_rows(requests: int) -> list[dict[str, Any]]:
    """Measure how long queueing and assigning one request takes, by length of its prompt."""

    rng = np.random.default_rng(0)
    empty = np.zeros((1, DECISION_VOCABULARY), dtype=np.int8)
    schedule = Schedule(
        token_to_rank=empty,
        confidence=empty.view(np.uint8),
        request_affinity=rng.dirichlet(np.ones(DECISION_RANKS), size=DECISION_VOCABULARY).astype(
            np.float16
        ),
    )
    cost = ServingCost(
        model=MODEL, accelerator=ACCELERATOR, topology=Topology.uniform(DECISION_RANKS, num_nodes=8)
    )
    loads = [
        RankLoad(pending_tokens=rank, running=1, kv_tokens_total=10**7)
        for rank in range(DECISION_RANKS)
    ]
    schedulers = {
        label: make_scheduler(
            "semantic",
            ep_size=DECISION_RANKS,
            schedule=schedule,
            top_k=MODEL.top_k,
            cost=cost,
            prefix_tokens_per_rank=prefix_tokens,
        )
        for label, prefix_tokens in (("no prefix cache", 0), ("with prefix cache", 10**6))
    }
    rounds: dict[tuple[int, str], list[list[float]]] = {}
    for _ in range(DECISION_ROUNDS):
        for tokens in (128, 512, 2048, 8192):
            prompts = rng.integers(DECISION_VOCABULARY, size=(requests, tokens))
            for label, scheduler in schedulers.items():
                measured = [_decide(scheduler, loads, ids) for ids in prompts]
                rounds.setdefault((tokens, label), []).append(measured)
    rows: dict[int, dict[str, Any]] = {}
    for (tokens, label), measured_rounds in rounds.items():
        quietest = min(measured_rounds, key=statistics.median)
        row = rows.setdefault(tokens, {"prompt_tokens": tokens})
        row[f"{label}, p50"] = statistics.median(quietest)
        row[f"{label}, p99"] = float(np.percentile(quietest, 99))
    return list(rows.values())


def _decide(scheduler: Any, loads: Sequence[RankLoad], ids: np.ndarray) -> float:
    request = EngineRequest(
        id="one", prompt_token_ids=ids.tolist(), sampling=SamplingParams(max_tokens=128)
    )
    start = time.perf_counter()
    scheduler.add(request, now=0.0)
    assigned = scheduler.assign(loads, now=0.0)
    seconds = time.perf_counter() - start
    assert len(assigned) == 1
    scheduler.finished(request.id, new_tokens=100)
    return seconds * 1e6


def _table(rows: Sequence[Row], arrivals: str, link: str) -> Table:
    here = [row for row in rows if (row["arrivals"], row["link"]) == (arrivals, link)]
    shown = {
        "load": "load",
        "variant": "variant",
        "ttft_p50_ms": "TTFT p50 ms",
        "ttft_p99_ms": "TTFT p99 ms",
        "tpot_mean_ms": "TPOT mean ms",
        "tpot_p99_ms": "TPOT p99 ms",
        "goodput": "good req/s",
        "good_share": "good share",
        "lar": "LAR",
        "remote_copies": "remote copies",
        "prefix_hit": "prefix hit",
        "tokens_max_over_mean": "tokens max/mean",
        "wait_max_ms": "longest wait ms",
    }
    first = here[0]
    return Table(
        title=f"{arrivals} on {link}; SLO: TTFT {first['slo_ttft_ms']:.0f} ms, "
        f"TPOT {first['slo_tpot_ms']:.1f} ms; load 1 = {first['rate'] / first['load']:.1f} req/s",
        rows=[{label: row[key] for key, label in shown.items()} for row in here],
    )


def _charts(rows: Sequence[Row], arrivals: str, link: str) -> list[Chart]:
    # The ablations would crowd the panels; they are in the tables.
    here = [
        row
        for row in rows
        if (row["arrivals"], row["link"]) == (arrivals, link) and ", no" not in row["variant"]
    ]
    return [
        Chart(
            title=f"{arrivals}, {link}: {label}",
            kind="lines",
            rows=here,
            x="rate",
            y=figure,
            series="variant",
            y_label=label,
        )
        for figure, label in (
            ("ttft_p99_ms", "TTFT p99, ms"),
            ("tpot_mean_ms", "TPOT mean, ms"),
            ("goodput", "goodput, requests/s"),
        )
    ]


def _protocol(args: argparse.Namespace) -> dict[str, Any]:

    return {
        "predicted": "all times but those of a decision come from the cost model",
        "model": dataclasses.asdict(MODEL),
        "accelerator": dataclasses.asdict(ACCELERATOR),
        "rank_limits": dataclasses.asdict(LIMITS),
        "ep_size": args.ep,
        "links": {name: dataclasses.asdict(LINKS[name]) for name in args.links},
        "sources": {
            "mooncake": "Mooncake FAST'25 conversation trace: arrivals, lengths, shared blocks",
            "azure-code": "Azure LLM inference 2023 code trace: arrivals and lengths; which "
            "prompts share a beginning is not recorded, so none do",
            "texts": "chat (Puffin), GSM8K test, HumanEval; a conversation keeps to one",
            "routes": "DeepSeek-V2-Lite-Chat trace of ngavhane/moe-beyond @4dca2eac",
        },
        "lengths": {name: f"divided by {TRACES[name].scale}" for name in args.arrivals},
        "arrivals": f"first {args.requests} requests, times stretched to the mean rate",
        "load": "rate / requests a second of the baseline when all arrive at once",
        "split": f"{args.profile_fraction:.0%} of the trace's requests profiled, rest replayed",
        "expert_choice": "chat tokens take their own recorded routes; a token of other texts takes "
        "those of a random occurrence of its id in the held-out part (an id unseen there, of any "
        "token). Each token of a request counts with the mean of its prompt's tokens, new tokens "
        "too",
        "step": "slowest rank's dense compute or weights, + longest KV read, + per layer the "
        "busiest rank's experts or weights, + dispatch and combine; nothing else overlaps",
        "slo": f"{SLO_FACTOR} x the baseline's median TTFT and TPOT at the lightest load",
        "baseline": BASELINE.name,
        "ablations": "the scheduler does not see prefixes, or experts; ranks are as before",
        "seed": args.seed,
        "decision": f"queueing and assigning one request; at most {SAMPLED_TOKENS} tokens of a "
        "prompt are looked up; of the quietest of "
        f"{DECISION_ROUNDS} rounds, other work on the machine disturbs it",
    }
