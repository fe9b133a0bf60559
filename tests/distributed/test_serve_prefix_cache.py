"""Requests that begin alike: the same tokens with and without the prefix cache."""

import time

import pytest

from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.serve.protocol import EngineRequest, SamplingParams
from tests.distributed.launcher import run_ranks
from tests.distributed.test_serve_attention_tp import load as load_heads
from tests.distributed.test_serve_engine import (
    WINDOWED,
    contiguous,
    load,
    placements,
    save_tiny_model,
    single_process,
)
from tests.distributed.test_serve_group import Client, save_plan

pytestmark = pytest.mark.distributed

BLOCK = 4
BEGINNING = [11, 23, 5, 42, 17, 30, 8, 19, 27, 3, 60, 71]  # 3 blocks
PROMPTS = [
    [*BEGINNING, 50],
    [*BEGINNING, 51, 52, 53, 54, 55],
    [*BEGINNING, 50],  # equal to the first
    BEGINNING,  # ends with a block: its last token is computed again
    [9, *BEGINNING[1:], 50],  # differs in the first token
    [*BEGINNING, 51, 52, 53, 54, 56],
]
# When they come one after another: new tokens are cached too, but no prompt goes on with them.
CACHED = [0, 12, 12, 8, 0, 16]
ADDED = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


def save_model(path, family="qwen3_moe", **changes):
    return save_tiny_model(path, family, eos_token_id=None, **changes)


def _serve(worker, prompts, *, together):
    """Tokens of each prompt, and what was cached of it."""
    outputs, cached = [[] for _ in prompts], [0] * len(prompts)
    arriving = list(enumerate(prompts))
    while arriving or worker.batcher:
        if arriving and (together or not worker.batcher):
            number, prompt = arriving.pop(0)
            worker.add(EngineRequest(id=str(number), prompt_token_ids=prompt, sampling=ADDED))
        for event in worker.step():
            outputs[int(event.request_id)] += event.token_ids
            cached[int(event.request_id)] = event.cached_tokens
    assert worker.batcher.pool.num_free == worker.batcher.pool.num_blocks
    return outputs, cached


def _one_rank(rank, ranks, directories):
    preemptions = 0
    for name, directory in directories.items():
        want = single_process(directory, PROMPTS, ADDED.max_tokens)
        engine = load(directory, contiguous(1))
        roomy = {"kv_cache_tokens": 400, "block_size": BLOCK, "max_step_tokens": 7}
        for prefix_cache, cached in ((False, [0] * len(PROMPTS)), (True, CACHED)):
            worker = engine.worker(**roomy, max_sequences=4, prefix_cache=prefix_cache)
            assert _serve(worker, PROMPTS, together=False) == (want, cached), name
            again, _ = _serve(worker, PROMPTS, together=True)
            assert again == want, name
        # So few blocks that sequences lose theirs, and that what is kept is given up.
        crowded = engine.worker(
            kv_cache_tokens=28, block_size=BLOCK // 2, max_sequences=4, max_step_tokens=7,
            prefix_cache=True,
        )  # fmt: skip
        for _ in range(2):
            assert _serve(crowded, PROMPTS, together=True)[0] == want, name
        preemptions += crowded.batcher.preemptions
        assert crowded.batcher.prefix_hits > 0
    assert preemptions > 0


def test_one_rank_generates_the_same_tokens_with_and_without_the_cache(tmp_path):
    families = {"qwen3_moe": {}, "deepseek_v3": {}, "gpt_oss": WINDOWED["gpt_oss"]}
    run_ranks(
        _one_rank,
        1,
        {name: save_model(tmp_path / name, name, **more) for name, more in families.items()},
    )


def _shared(client, want, plans, output):
    for number, prompt in enumerate(PROMPTS[:3]):
        client.submit(f"a{number}", prompt, ADDED)
        assert client.tokens(f"a{number}") == want[number]
    assert [client.last(f"a{n}").cached_tokens for n in range(3)] == CACHED[:3]
    # Keys depend on weights and tokens, not on where experts are.
    for name, plan in plans.items():
        assert client.engine.reload_plan(plan).result(60)["experts_moved"] > 0
        client.submit(name, PROMPTS[0], ADDED)
        assert client.tokens(name) == want[0]
        assert client.last(name).cached_tokens == 12
    if output is not None:
        client.engine.record("start").result(60)
        client.submit("recorded", PROMPTS[5], ADDED)
        assert client.tokens("recorded") == want[5]
        client.engine.record("stop").result(60)
        # Tokens whose keys were cached did not pass the routers again.
        computed = len(PROMPTS[5]) - 16 + len(want[5]) - 1
        assert client.engine.record("dump", output).result(60)["tokens"] == computed
        assert RoutingProfile.read(output).token_count.sum() == computed
    client.engine.drain().result(60)
    time.sleep(1.2)  # Counters of other ranks come every half second.
    stats = client.engine.stats()
    asked = PROMPTS[:3] + [PROMPTS[0]] * len(plans) + ([PROMPTS[5]] if output else [])
    hits = sum(CACHED[:3]) + 12 * len(plans) + (16 if output else 0)
    assert sum(rank.prefix_cache_queries for rank in stats.ranks) == sum(map(len, asked))
    assert sum(rank.prefix_cache_hits for rank in stats.ranks) == hits
    assert stats.kv_usage == 0


def _group(rank, ranks, directory, plans, output):
    from semantic_ep.serve.scheduling.make import make_scheduler
    from semantic_ep.serve.start import serve_group

    want = single_process(directory, PROMPTS, ADDED.max_tokens) if rank == 0 else None
    placement = placements(ranks)["random"]
    heads = output is None
    # All requests go to one rank, where the cache is.
    engine = load_heads(directory, placement, None) if heads else load(directory, placement)
    serve_group(
        engine,
        scheduler=make_scheduler(
            "prefix-only", ep_size=1 if heads else ranks, max_wait_seconds=0,
            prefix_block_size=BLOCK, prefix_tokens_per_rank=500,
        ),
        front=lambda running: _shared(Client(running), want, plans, output),
        kv_cache_tokens=512,
        block_size=BLOCK,
        prefix_cache=True,
    )  # fmt: skip


@pytest.mark.parametrize("attention", ["dp", "tp"])
def test_hits_are_counted_and_outlast_another_plan(tmp_path, attention):
    directory = save_model(tmp_path / "model")
    plans = {
        name: save_plan(tmp_path / name, directory, placements(2)[name])
        for name in ("contiguous", "random")
    }
    run_ranks(_group, 2, directory, plans, tmp_path / "profile" if attention == "dp" else None)
