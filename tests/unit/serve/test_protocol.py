import asyncio
import dataclasses
import subprocess
import sys
import threading

import pytest

from semantic_ep.errors import RequestError
from semantic_ep.serve.protocol import EngineRequest, SamplingParams, TokenEvent, submitted
from semantic_ep.serve.stats import EngineStats, RankLoad, RankStats

REQUEST = EngineRequest(id="a", prompt_token_ids=[1], sampling=SamplingParams())


class Echo:
    """Answers from another thread, as an engine does, and notes what was cancelled."""

    def __init__(self, events):
        self.events, self.cancelled = events, []

    def submit(self, request, on_event):
        threading.Thread(target=lambda: [on_event(event) for event in self.events]).start()

    def cancel(self, request_id):
        self.cancelled.append(request_id)


def events(count):
    last = TokenEvent(request_id="a", token_ids=(count,), finish_reason="length")
    return [TokenEvent(request_id="a", token_ids=(n,)) for n in range(count)] + [last]


def test_a_stream_ends_with_the_event_that_has_a_finish_reason():
    engine = Echo(events(3))

    async def collect():
        with submitted(engine, [REQUEST]) as arriving:
            return [event async for event in arriving]

    assert asyncio.run(collect()) == engine.events
    assert engine.cancelled == []


def test_a_client_that_leaves_a_stream_cancels_what_has_not_ended():
    engine = Echo(events(1))
    other = dataclasses.replace(REQUEST, id="b")

    async def main():
        with submitted(engine, [REQUEST, other]) as arriving:
            assert (await anext(arriving)).token_ids == (0,)

    asyncio.run(main())
    assert sorted(engine.cancelled) == ["a", "b"]


def test_when_one_request_is_refused_none_is_served():
    class Refusing(Echo):
        def submit(self, request, on_event):
            if request.id == "b":
                raise RequestError("no")

    engine = Refusing([])

    async def main():
        with submitted(engine, [REQUEST, dataclasses.replace(REQUEST, id="b")]):
            pass

    with pytest.raises(RequestError):
        asyncio.run(main())
    assert engine.cancelled == ["a"]


def test_stats_of_the_group_are_sums_and_ratios_over_its_ranks():
    def rank(running, used, local, computed):
        return RankStats(
            load=RankLoad(running=running, waiting=1, kv_tokens_used=used, kv_tokens_total=100),
            routed_tokens=50,
            activations=100,
            local_activations=local,
            computed_activations=computed,
            rows={"rank": 40, "node": 10, "network": 5},
            bytes={"rank": 400, "node": 100, "network": 50},
        )

    stats = EngineStats(ranks=(rank(2, 30, 80, 150), rank(1, 20, 60, 50)), queued=3)
    assert (stats.running, stats.waiting) == (3, 5)
    assert stats.kv_usage == pytest.approx(0.25)
    assert stats.local_activation_rate == pytest.approx(0.7)
    assert stats.remote_copies == pytest.approx(0.3)
    assert stats.balance == pytest.approx(100 / 150)
    assert stats.bytes_by_tier() == {"rank": 800, "node": 200, "network": 100}
    unused = EngineStats(ranks=(RankStats(load=RankLoad()),) * 2)
    assert (unused.kv_usage, unused.local_activation_rate, unused.balance) == (0, 0, 1)


def test_the_protocol_needs_no_torch():
    code = "import sys, semantic_ep.serve.protocol; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
