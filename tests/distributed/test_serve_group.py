import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from semantic_ep.apply.checkpoint import checkpoint_fingerprint
from semantic_ep.errors import PeerFailureError, PlacementError, RequestError, UnavailableError
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan.plan import Plan
from semantic_ep.plan.schedule import Schedule
from semantic_ep.serve.protocol import EngineRequest, SamplingParams
from tests.distributed.launcher import run_ranks
from tests.distributed.test_serve_engine import (
    LAYERS,
    VOCAB,
    contiguous,
    load,
    placements,
    save_tiny_model,
    single_process,
)

pytestmark = pytest.mark.distributed

GREEDY = SamplingParams(max_tokens=8, temperature=0)
LONG = SamplingParams(max_tokens=24, temperature=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("group") / "model", "qwen3_moe")


class Client:
    """Submits requests to an engine and waits for their ends."""

    def __init__(self, engine):
        self.engine, self.events, self.ended = engine, {}, {}

    def submit(self, name, prompt, sampling=GREEDY, on_event=None):
        events, ended = self.events.setdefault(name, []), threading.Event()
        self.ended[name] = ended

        def take(event):
            events.append(event)
            if on_event is not None:
                on_event(event)
            if event.finish_reason is not None:
                ended.set()

        self.engine.submit(EngineRequest(id=name, prompt_token_ids=prompt, sampling=sampling), take)

    def tokens(self, name):
        assert self.ended[name].wait(60)
        return [token for event in self.events[name] for token in event.token_ids]

    def last(self, name):
        assert self.ended[name].wait(60)
        return self.events[name][-1]


def serving(directory, test, *args, **options):
    """Serve on every rank and run `test(client, *args)` on rank 0."""
    from semantic_ep.serve.scheduling.make import make_scheduler
    from semantic_ep.serve.start import serve_group

    ranks = dist.get_world_size()
    engine = load(directory, contiguous(1) if ranks == 1 else placements(ranks)["random"])
    fronts = []

    def front(running):
        fronts.append(running)
        test(Client(running), *args)

    serve_group(
        engine,
        scheduler=make_scheduler("round-robin", ep_size=ranks, max_wait_seconds=0),
        front=front,
        **{"kv_cache_tokens": 512, "block_size": 4, **options},
    )
    for closed in fronts:
        assert not closed.healthy
        with pytest.raises(UnavailableError, match="closed"):
            closed.submit(EngineRequest(id="late", prompt_token_ids=[1], sampling=GREEDY), print)


def random_prompts(count, longest=40):
    draw = np.random.default_rng(count)
    lengths = draw.integers(1, longest, count)
    return [draw.integers(3, VOCAB, length).tolist() for length in lengths]


def _mixed(client, prompts, want):
    # Arrivals while others run, cancelled ones between them.
    for number, prompt in enumerate(prompts):
        client.submit(f"r{number}", prompt, LONG)
        client.submit(f"c{number}", prompt, SamplingParams(max_tokens=24, ignore_eos=True))
        time.sleep(0.01)
        client.engine.cancel(f"c{number}")
    for number, tokens in enumerate(want):
        assert client.tokens(f"r{number}") == tokens, number
        assert client.last(f"c{number}").finish_reason in ("cancelled", "length")
    client.engine.drain().result(60)
    time.sleep(1.2)  # Counters of other ranks come every half second.
    stats = client.engine.stats()
    assert stats.running == stats.waiting == 0
    assert stats.kv_usage == 0
    assert sum(rank.preemptions for rank in stats.ranks) > 0
    assert all(rank.new_tokens > 0 and rank.routed_tokens > 0 for rank in stats.ranks)
    assert 0 < stats.local_activation_rate < 1
    assert 0 < stats.remote_copies <= 1
    assert stats.bytes_by_tier()["node"] > 0
    assert stats.bytes_by_tier()["network"] == 0


def _mixed_batches(rank, ranks, directory):
    prompts = random_prompts(10, longest=20)
    want = single_process(directory, prompts, LONG.max_tokens) if rank == 0 else None
    # So few tokens a step that prompts come in chunks, and so few blocks that sequences are
    # pre-empted.
    serving(
        directory, _mixed, prompts, want, kv_cache_tokens=80, max_step_tokens=8, max_sequences=6
    )


def test_arrivals_chunks_preemptions_and_cancellations_do_not_change_tokens(model):
    run_ranks(_mixed_batches, 2, model)


def save_plan(directory, model, placement):
    Plan(
        placement=placement,
        schedule=Schedule(
            token_to_rank=np.zeros((LAYERS, VOCAB), dtype=np.int8),
            confidence=np.zeros((LAYERS, VOCAB), dtype=np.uint8),
            request_affinity=np.full((VOCAB, placement.ep_size), 0.5, dtype=np.float16),
        ),
        verdict={},
        fingerprint=checkpoint_fingerprint(model),
    ).save(directory)
    return directory


def _reload(client, plans, prompts, want):
    done = []

    def at_the_third_token(event):
        if len(client.events["r0"]) == 3:
            done.append(client.engine.reload_plan(plans["contiguous"]))

    for number, prompt in enumerate(prompts):
        client.submit(f"r{number}", prompt, on_event=at_the_third_token if not number else None)
    assert [client.tokens(f"r{n}") for n in range(len(prompts))] == want
    first = done[0].result(60)
    assert first["experts_moved"] > 0
    assert first["bytes_moved"] > 0
    again = client.engine.reload_plan(plans["contiguous"]).result(60)
    assert again["experts_moved"] == again["bytes_moved"] == 0
    assert again["sha256"] == first["sha256"]
    with pytest.raises(PlacementError, match="slots a rank"):
        client.engine.reload_plan(plans["replicated"]).result(60)
    client.submit("after", prompts[0])
    assert client.tokens("after") == want[0]
    assert client.engine.stats().plan_reloads == 2


def _reload_while_serving(rank, ranks, directory, plans):
    prompts = random_prompts(4)
    want = single_process(directory, prompts, GREEDY.max_tokens) if rank == 0 else None
    serving(directory, _reload, plans, prompts, want)


def test_a_plan_is_taken_over_between_two_steps_of_the_same_requests(model, tmp_path):
    plans = {
        name: save_plan(tmp_path / name, model, placement)
        for name, placement in placements(2).items()
    }
    run_ranks(_reload_while_serving, 2, model, plans)


def _resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _many_short_requests(client):
    room, before = threading.Semaphore(64), None
    for number in range(4000):
        room.acquire()
        if number == 1000:
            before = _resident_bytes()
        request = EngineRequest(
            id=str(number),
            prompt_token_ids=[5 + number % 60] * (1 + number % 9),
            sampling=SamplingParams(max_tokens=3, temperature=number % 2),
        )
        client.engine.submit(request, lambda event: event.finish_reason and room.release())
        if number % 5 == 0:
            client.engine.cancel(str(number))
    client.engine.drain().result(60)
    assert client.engine.stats().kv_usage == 0
    assert _resident_bytes() - before < 4e6


def _serve_many(rank, ranks, directory):
    serving(directory, _many_short_requests)


def test_memory_stays_flat_over_thousands_of_requests(model):
    run_ranks(_serve_many, 1, model)


def record_and_count(client, output):
    """Record while serving and hold the profile to the tokens that were computed."""
    for action, message in (("stop", "not being recorded"), ("dump", "no routing has been")):
        with pytest.raises(RequestError, match=message):
            client.engine.record(action, output).result(60)
    prompts = random_prompts(4)
    client.engine.record("start").result(60)
    with pytest.raises(RequestError, match="already"):
        client.engine.record("start").result(60)
    for number, prompt in enumerate(prompts):
        client.submit(f"r{number}", prompt)
    new = [client.tokens(f"r{number}") for number in range(len(prompts))]
    client.engine.record("stop").result(60)
    client.submit("unseen", prompts[0])
    client.tokens("unseen")
    run = [token for prompt, more in zip(prompts, new) for token in [*prompt, *more[:-1]]]
    assert client.engine.record("dump", output).result(60)["tokens"] == len(run)
    profile = RoutingProfile.read(output)
    assert profile.token_count.tolist() == np.bincount(run, minlength=VOCAB).tolist()
    assert profile.load.sum(axis=1).tolist() == [2 * len(run)] * LAYERS
    # Both phases of the same requests come to the whole.
    phases = {"prefill": prompts, "decode": [more[:-1] for more in new]}
    counted = {}
    for phase, parts in phases.items():
        client.engine.record("start", phase=phase).result(60)
        for number, prompt in enumerate(prompts):
            client.submit(f"{phase}{number}", prompt)
            assert client.tokens(f"{phase}{number}") == new[number]
        client.engine.record("stop").result(60)
        path = output.with_name(phase)
        client.engine.record("dump", path).result(60)
        counted[phase] = RoutingProfile.read(path)
        expected = np.bincount([t for part in parts for t in part], minlength=VOCAB)
        assert counted[phase].token_count.tolist() == expected.tolist()
        assert counted[phase].meta["phase"] == phase
    assert (counted["prefill"].load + counted["decode"].load).tolist() == profile.load.tolist()


def _record_while_serving(rank, ranks, directory, output):
    serving(directory, record_and_count, output)


def test_served_traffic_is_recorded_as_a_profile_of_all_ranks(model, tmp_path):
    run_ranks(_record_while_serving, 2, model, tmp_path / "profile")


def _sampling(client):
    def twice(prompt, **settings):
        sampling = SamplingParams(max_tokens=12, ignore_eos=True, **settings)
        names = [f"{settings}{n}" for n in range(2)]
        for name in names:
            client.submit(name, prompt, sampling)
        return [client.tokens(name) for name in names]

    greedy, _ = twice([5, 6, 7], temperature=0)
    same, equal = twice([5, 6, 7], seed=7)
    assert same == equal != greedy
    assert twice([5, 6, 7], top_k=1) == [greedy, greedy]
    assert twice([5, 6, 7], top_p=1e-9) == [greedy, greedy]
    one, other = twice([5, 6, 7])
    assert one != other
    stop = SamplingParams(max_tokens=12, temperature=0, stop_token_ids=(greedy[2],), logprobs=2)
    client.submit("stop", [5, 6, 7], stop)
    assert client.tokens("stop") == greedy[: greedy.index(greedy[2]) + 1]
    assert client.last("stop").finish_reason == "stop"
    assert client.last("stop").stop_reason == greedy[2]
    (told,) = client.last("stop").logprobs
    assert told.top[0] == (told.token_id, told.logprob)
    assert len(told.top) == 2
    for wrong, message in (
        (SamplingParams(temperature=-1), "temperature"),
        (SamplingParams(top_p=0), "top_p"),
        (SamplingParams(max_tokens=0), "max_tokens"),
        (SamplingParams(max_tokens=62), "too long.*64 in all"),
    ):
        with pytest.raises(RequestError, match=message):
            client.submit("wrong", [5, 6, 7], wrong)


def _sample(rank, ranks, directory):
    serving(directory, _sampling)


def test_every_request_is_sampled_in_its_own_way(model):
    run_ranks(_sample, 2, model)


def _lose_a_rank(rank, ranks, directory, how):
    from semantic_ep.serve.worker import RankWorker

    if rank == 1:
        step, count = RankWorker.step, iter(range(100))

        def last_step(worker):
            if next(count) == 3:
                os.kill(os.getpid(), how)
            return step(worker)

        RankWorker.step = last_step
    failed = threading.Event()
    start = time.monotonic()
    with pytest.raises(PeerFailureError, match="died or stopped answering"):
        serving(directory, _wait_for_errors, failed, on_failure=lambda error: failed.set())
    return time.monotonic() - start


def _wait_for_errors(client, failed):
    for name in ("a", "b"):
        client.submit(name, [5, 6], SamplingParams(max_tokens=40, ignore_eos=True))
    for name in ("a", "b"):
        assert client.last(name).finish_reason == "error"
        assert "died or stopped answering" in client.last(name).error
    assert failed.wait(5)
    assert not client.engine.healthy
    assert PeerFailureError.__name__ in client.engine.failure
    with pytest.raises(UnavailableError, match="stopped answering"):
        client.submit("c", [5])


def test_a_killed_rank_ends_requests_with_a_clear_error(model):
    seconds, _ = run_ranks(_lose_a_rank, 2, model, signal.SIGKILL, dying=[1])
    assert seconds < 10


def test_a_rank_that_hangs_ends_requests_when_the_time_out_has_passed(model):
    with pytest.raises(AssertionError, match=r"1 of 2 ranks failed\n--- rank 1: .*no result"):
        run_ranks(_lose_a_rank, 2, model, signal.SIGSTOP, collective_timeout=4, timeout=14)
