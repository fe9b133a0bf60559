"""What `/metrics` tells Prometheus: vLLM's names and meanings with our prefix, and the exchange.

Counters of ranks are the latest that the lockstep brought to rank 0 anyway, at most about a second
old: a scrape asks no rank. Times are those of rank 0's front, as close to the client as it gets.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan.drift import load_distance
from semantic_ep.serve.protocol import Engine, TokenEvent
from semantic_ep.serve.stats import EngineStats

PREFIX = "semantic_ep:"
# vLLM's, so that its dashboards fit.
_FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
_REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
# vLLM's names of the ways that a request ends.
_ENDS = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}


class Metrics:
    """Everything that one server tells.

    Args:
        engine: Its counters are read at each scrape.
        model_name: Label of every series.
        profile: What the plan in use was made from, for the drift; None: it is not told.
    """

    def __init__(
        self, engine: Engine, *, model_name: str, profile: RoutingProfile | None = None
    ) -> None:
        self.profile = profile
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine, model_name, lambda: self.profile))

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            made = Histogram(
                PREFIX + name, text, ["model_name"], buckets=buckets, registry=self.registry
            )
            return made.labels(model_name)

        self.first_token = histogram(
            "time_to_first_token_seconds", "Arrival to first token", _FIRST_TOKEN_SECONDS
        )
        self.inter_token = histogram(
            "inter_token_latency_seconds", "Between two tokens of a sequence", _TOKEN_SECONDS
        )
        self.per_token = histogram(
            "request_time_per_output_token_seconds",
            "Mean time between the tokens of a sequence",
            _TOKEN_SECONDS,
        )
        self.whole = histogram(
            "e2e_request_latency_seconds", "Arrival to last token", _REQUEST_SECONDS
        )
        self.prompt_tokens = histogram("request_prompt_tokens", "Tokens of a prompt", _TOKENS)
        self.new_tokens = histogram(
            "request_generation_tokens", "Tokens generated for a sequence", _TOKENS
        )
        ended = Counter(
            PREFIX + "request_success",
            "Sequences that ended, by why; abort: the client went away",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.ended = {
            reason: ended.labels(model_name, told) for reason, told in _ENDS.items()
        }  # all exist from the start, at 0

    def text(self) -> bytes:
        """Answer of a scrape, in Prometheus' text format."""
        return generate_latest(self.registry)


class Timed:
    """Measures the sequences of one HTTP request; leaving early counts the rest as aborted.

    Args:
        metrics: Where to.
        prompt_tokens: Of each sequence, by its id.
    """

    def __init__(self, metrics: Metrics, prompt_tokens: dict[str, int]) -> None:
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._started = time.perf_counter()
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._count = dict.fromkeys(prompt_tokens, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for _ in self._count:
            self._metrics.ended["cancelled"].inc()

    async def observe(self, events: AsyncIterator[TokenEvent]) -> AsyncIterator[TokenEvent]:
        """Pass events on."""
        async for event in events:
            self._take(event)
            yield event

    def _take(self, event: TokenEvent) -> None:
        metrics, name, now = self._metrics, event.request_id, time.perf_counter()
        if event.token_ids:
            if name in self._last:
                metrics.inter_token.observe(now - self._last[name])
            else:
                self._first[name] = now
                metrics.first_token.observe(now - self._started)
            self._last[name] = now
            self._count[name] += len(event.token_ids)
        if event.finish_reason is None:
            return
        count = self._count.pop(name)
        metrics.ended[event.finish_reason].inc()
        if event.finish_reason not in ("stop", "length"):
            return
        metrics.whole.observe(now - self._started)
        metrics.prompt_tokens.observe(self._prompt_tokens[name])
        metrics.new_tokens.observe(count)
        if count > 1:
            metrics.per_token.observe((self._last[name] - self._first[name]) / (count - 1))


class _EngineCollector(Collector):
    """Counters of the engine, read when asked."""

    def __init__(
        self, engine: Engine, model_name: str, profile: Callable[[], RoutingProfile | None]
    ) -> None:
        self._engine = engine
        self._model_name = model_name
        self._profile = profile

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        stats = self._engine.stats()
        ranks = stats.ranks
        gauge, counter = self._gauge, self._counter
        yield gauge("num_requests_running", "Sequences that hold KV blocks", stats.running)
        yield gauge("num_requests_waiting", "Sequences that do not run yet", stats.waiting)
        yield gauge("kv_cache_usage_perc", "Share of KV positions in use, 1 is all", stats.kv_usage)
        yield counter("prompt_tokens", "Prompt tokens taken", [r.prompt_tokens for r in ranks])
        yield counter("generation_tokens", "Tokens generated", [r.new_tokens for r in ranks])
        yield counter(
            "num_preemptions", "Times a sequence lost its blocks", [r.preemptions for r in ranks]
        )
        yield counter(
            "prefix_cache_queries",
            "Prompt tokens looked for in the prefix cache",
            [r.prefix_cache_queries for r in ranks],
        )
        yield counter(
            "prefix_cache_hits",
            "Prompt tokens found in the prefix cache",
            [r.prefix_cache_hits for r in ranks],
        )
        yield gauge(
            "local_activation_rate",
            "Share of (token, expert) activations computed on the token's rank",
            stats.local_activation_rate,
        )
        yield gauge(
            "remote_copies",
            "Mean number of other ranks that a token is sent to in a layer",
            stats.remote_copies,
        )
        yield gauge("balance", "Mean over max of the ranks' activations, 1 is even", stats.balance)
        yield self._by_tier(
            "exchange_bytes", "Payload of dispatch and combine", stats.bytes_by_tier()
        )
        yield counter("lockstep_steps", "Steps in which some rank had tokens", [stats.steps])
        yield counter("lockstep_step_seconds", "Time of these", [stats.step_seconds])
        yield counter("plan_reloads", "Placements taken over", [stats.plan_reloads])
        yield from self._per_rank(stats)
        profile = self._profile()
        if profile is not None:
            load = stats.expert_load(profile.fingerprint.num_experts)
            if load.any():
                yield gauge(
                    "routing_drift",
                    "Total variation between the expert load since the plan was taken over and "
                    "that of its profile, mean over layers, 0..1",
                    float(load_distance(profile.load, load).mean()),
                )

    def _per_rank(self, stats: EngineStats) -> Iterator[Metric]:
        running = GaugeMetricFamily(
            PREFIX + "rank_requests_running",
            "Sequences that hold KV blocks of a rank",
            labels=["model_name", "rank"],
        )
        computed = CounterMetricFamily(
            PREFIX + "rank_computed_activations",
            "Rows that a rank's experts computed",
            labels=["model_name", "rank"],
        )
        for number, rank in enumerate(stats.ranks):
            labels = [self._model_name, str(number)]
            running.add_metric(labels, rank.load.running)
            computed.add_metric(labels, rank.computed_activations)
        yield running
        yield computed

    def _by_tier(self, name: str, text: str, by_tier: dict[str, int]) -> Metric:
        family = CounterMetricFamily(
            PREFIX + name, f"{text}, by link tier", labels=["model_name", "tier"]
        )
        for tier, count in by_tier.items():
            family.add_metric([self._model_name, tier], count)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, text: str, values: Sequence[float]) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model_name], sum(values))
        return family
