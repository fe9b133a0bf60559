from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semantic_ep.serve.batcher import Batcher
from semantic_ep.serve.blocks import BlockPool
from semantic_ep.serve.protocol import EngineRequest, SamplingParams
from semantic_ep.serve.sequences import Sequence

BLOCK, BLOCKS = 4, 12
FITS = BLOCK * BLOCKS


def sequence(name, prompt, new_tokens=1):
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0)
    prompt = [7] * prompt if isinstance(prompt, int) else prompt
    request = EngineRequest(id=name, prompt_token_ids=prompt, sampling=sampling)
    return Sequence(request, stop_ids=frozenset())


def batcher(**options):
    pool = BlockPool(num_blocks=BLOCKS, block_size=BLOCK)
    return Batcher(pool, **{"max_sequences": 4, "max_step_tokens": 8, **options})


def run_step(subject):
    """What a worker does with a plan; returns it with the sequences that ended."""
    plan, ended = subject.plan(), []
    for member, count in plan:
        ready = count == member.pending
        subject.advance(member, count)
        if ready and member.append(5)[1] is not None:
            ended.append(subject.remove(member.request.id))
    return plan, ended


def check_blocks(subject, alive):
    pool, holders = subject.pool, Counter(b for member in alive for b in member.blocks)
    assert pool._holders == holders
    assert len(holders) + pool.num_free == BLOCKS
    free, kept = set(np.flatnonzero(pool._free).tolist()), set(pool._kept)
    assert sorted([*holders, *free, *kept]) == list(range(BLOCKS)), "a block in two states"
    assert {block: name for name, block in pool._block_of.items()} == pool._name_of
    assert kept <= set(pool._name_of)
    assert free.isdisjoint(pool._name_of)
    for member in alive:
        for number, block in enumerate(member.blocks):
            if holders[block] > 1:
                assert (number + 1) * BLOCK <= member.computed, "shared, and still written to"


@pytest.mark.parametrize("prefix_cache", [False, True])
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_request_ends_and_no_block_is_lost_or_given_twice(prefix_cache, data):
    subject, alive, ended, arrivals = batcher(prefix_cache=prefix_cache), {}, set(), 0
    for _ in range(data.draw(st.integers(1, 30))):
        action = data.draw(st.sampled_from(["arrive", "step", "step", "cancel"]))
        if action == "arrive":
            prompt = data.draw(st.integers(1, FITS - 1))
            new = data.draw(st.integers(1, FITS - prompt))
            # Beginnings of three texts, so that many are alike.
            text = [data.draw(st.integers(7, 9))] * prompt
            alive[str(arrivals)] = sequence(str(arrivals), text, new)
            subject.add(alive[str(arrivals)])
            arrivals += 1
        elif action == "cancel" and alive:
            name = data.draw(st.sampled_from(sorted(alive)))
            assert subject.remove(name) is alive.pop(name)
        else:
            plan, done = run_step(subject)
            assert sum(count for _, count in plan) <= 8
            assert len({member.request.id for member, _ in plan}) == len(plan) <= 4
            assert plan or not alive
            for member, _ in plan:
                assert member in done or len(member.blocks) * BLOCK >= member.computed
            for member in done:
                del alive[member.request.id]
        check_blocks(subject, alive.values())
    steps = 0
    while alive:
        _, done = run_step(subject)
        ended |= {member.request.id for member in done}
        for member in done:
            del alive[member.request.id]
        steps += 1
        assert steps < 2000, "a request never ends"
    assert not subject
    check_blocks(subject, [])
    assert subject.pool.num_free == BLOCKS
    assert prefix_cache or not subject.pool._kept
    assert subject.load().kv_tokens_used == 0
    assert not subject.pool._expected.any()
    assert not subject.pool._ends


def test_blocks_of_sequences_that_grow_together_follow_each_other():
    pool = BlockPool(num_blocks=BLOCKS, block_size=BLOCK)
    held = {name: [] for name in "abc"}
    for blocks in held.values():
        assert pool.begin(blocks, 1, expected=FITS // 3) == 0
    for tokens in range(1, FITS // 3 + 1):
        for blocks in held.values():
            assert pool.grow(blocks, tokens)
    starts = sorted(blocks[0] for blocks in held.values())
    assert starts == [0, BLOCKS // 3, 2 * BLOCKS // 3]
    assert all(blocks == list(range(blocks[0], blocks[0] + 4)) for blocks in held.values())
    assert pool.begin([], 1) is None


def test_a_block_that_somebody_expects_to_need_is_given_to_who_needs_it_now():
    pool = BlockPool(num_blocks=BLOCKS, block_size=BLOCK)
    first, second = [], []
    assert pool.begin(first, BLOCK, expected=FITS) == 0
    assert pool.begin(second, FITS - BLOCK) == 0
    assert pool.num_free == 0
    assert sorted([*first, *second]) == list(range(BLOCKS))
    pool.release(first)
    pool.release(second)
    assert pool.num_free == BLOCKS
    assert not pool._expected.any()
    assert not pool._ends


def test_decoding_goes_on_while_a_long_prompt_comes_in_chunks():
    subject = batcher()
    subject.add(sequence("short", 2, 20))
    subject.add(sequence("long", 20, 4))
    counts = [{m.request.id: n for m, n in run_step(subject)[0]} for _ in range(4)]
    assert counts == [
        {"short": 2, "long": 6},
        {"short": 1, "long": 7},
        {"short": 1, "long": 7},
        {"short": 1, "long": 1},
    ]


def test_the_youngest_gives_its_blocks_up_and_is_computed_again():
    subject = batcher(max_step_tokens=64)
    old, young = sequence("old", 20, 20), sequence("young", 20, 20)
    subject.add(old)
    subject.add(young)
    order = []
    while subject:
        order += [member.request.id for member in run_step(subject)[1]]
    assert order == ["old", "young"]
    assert subject.preemptions >= 1
    assert old.num_new == young.num_new == 20


def test_load_counts_what_runs_waits_and_is_still_to_prefill():
    subject = batcher(max_sequences=1)
    subject.add(sequence("a", 10, 4))
    subject.add(sequence("b", 5, 4))
    run_step(subject)
    load = subject.load()
    assert (load.running, load.waiting, load.pending_tokens) == (1, 1, 2 + 5)
    assert (load.kv_tokens_used, load.kv_tokens_total) == (12, FITS)


def test_one_arriving_after_another_cannot_starve_it():
    subject = batcher(max_sequences=2)
    subject.add(sequence("big", FITS - 4, 4))
    draw, done = np.random.default_rng(0), []
    for number in range(60):
        subject.add(sequence(f"small{number}", int(draw.integers(1, 6)), 3))
        done += [member.request.id for member in run_step(subject)[1]]
        if "big" in done:
            break
    assert done[0] == "big"
