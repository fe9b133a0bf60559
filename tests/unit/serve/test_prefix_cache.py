"""Blocks that sequences share: found by what they hold, given up in order of last use."""

from hypothesis import given, settings
from hypothesis import strategies as st

from semantic_ep.serve.batcher import Batcher
from semantic_ep.serve.blocks import BlockPool, block_name
from semantic_ep.serve.protocol import EngineRequest, SamplingParams
from semantic_ep.serve.sequences import Sequence

BLOCK, BLOCKS = 4, 12
FITS = BLOCK * BLOCKS


def batcher(**options):
    pool = BlockPool(num_blocks=BLOCKS, block_size=BLOCK)
    options = {"max_sequences": 4, "max_step_tokens": 64, "prefix_cache": True} | options
    return Batcher(pool, **options)


def sequence(name, prompt, new_tokens=1):
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0)
    request = EngineRequest(id=name, prompt_token_ids=prompt, sampling=sampling)
    return Sequence(request, stop_ids=frozenset())


def step(subject):
    computed = {}
    for member, count in subject.plan():
        ready = count == member.pending
        subject.advance(member, count)
        computed[member.request.id] = count
        if ready and member.append(5)[1] is not None:
            subject.remove(member.request.id)
    return computed


def run(subject, *members):
    """Serve to the end; returns the tokens computed of each."""
    for member in members:
        subject.add(member)
    computed = dict.fromkeys((member.request.id for member in members), 0)
    while subject:
        for name, count in step(subject).items():
            computed[name] += count
    return computed


def names_of(tokens, count):
    names, before = [], b""
    for number in range(count):
        before = block_name(before, tokens[number * BLOCK : (number + 1) * BLOCK])
        names.append(before)
    return names


def test_names_depend_on_every_token_before():
    assert names_of([1] * 8, 2) == names_of([1] * 9, 2)
    assert names_of([1] * 8, 2)[1] != names_of([2, *[1] * 7], 2)[1]
    assert names_of([1] * 8, 2)[0] != names_of([1] * 8, 2)[1]


def test_only_what_differs_is_computed_and_the_last_token_always():
    subject = batcher()
    text = list(range(20))
    assert run(subject, sequence("a", text)) == {"a": 20}
    # Equal: all but the last block, whose last token has to be computed.
    assert run(subject, sequence("b", text)) == {"b": 4}
    assert run(subject, sequence("c", [*text[:10], 99])) == {"c": 3}
    assert run(subject, sequence("d", [99, *text])) == {"d": 21}
    assert (subject.prefix_queries, subject.prefix_hits) == (20 + 20 + 11 + 21, 16 + 8)
    assert subject.pool.num_free == BLOCKS


def test_generated_tokens_are_found_by_the_next_turn_of_a_conversation():
    subject = batcher()
    first = sequence("a", [1, 2, 3], new_tokens=7)
    run(subject, first)
    # The last token was never run through the model.
    assert run(subject, sequence("b", [*first.tokens, 8, 9])) == {"b": 12 - 8}


def test_blocks_are_shared_while_others_use_them_and_freed_by_the_last():
    subject = batcher()
    text = list(range(17))
    first, second = sequence("a", text, 20), sequence("b", text, 20)
    subject.add(first)
    step(subject)
    subject.add(second)
    step(subject)
    assert first.blocks[:4] == second.blocks[:4]
    assert set(first.blocks[4:]).isdisjoint(second.blocks[4:])
    assert subject.pool.num_free == BLOCKS - 6
    subject.remove("a")
    assert subject.pool.num_free == BLOCKS - 5
    assert (first.cached_tokens, second.cached_tokens) == (0, 16)
    subject.remove("b")
    assert subject.pool.num_free == BLOCKS


def test_a_block_that_is_still_being_filled_is_not_shared():
    subject = batcher(max_step_tokens=6)
    text = list(range(17))
    subject.add(sequence("a", text))
    subject.add(sequence("b", text))
    assert [step(subject) for _ in range(2)] == [{"a": 6}, {"a": 6}]
    # When "b" starts, "a" has filled 3 blocks; the fourth is filled in the same step.
    assert [step(subject) for _ in range(2)] == [{"a": 5, "b": 1}, {"b": 4}]


def test_a_preempted_sequence_starts_behind_what_is_left_of_it_and_counts_once():
    subject = batcher()
    old, young = sequence("old", [1] * 20, 20), sequence("young", [2] * 20, 20)
    computed = run(subject, old, young)
    assert subject.preemptions >= 1
    assert old.num_new == young.num_new == 20
    assert (subject.prefix_queries, subject.prefix_hits) == (40, 0)
    assert young.cached_tokens == 0
    assert 39 < computed["young"] < 39 + 20 + 20  # less than from its beginning


def test_the_longest_unused_is_given_up_first_and_the_end_before_the_beginning():
    subject = batcher()
    for number in (1, 2, 3):
        run(subject, sequence(str(number), [number] * 16))
    run(subject, sequence("1 again", [1] * 16))  # now 2 is the oldest
    assert subject.pool.num_free == BLOCKS
    run(subject, sequence("4", [4] * 11))
    pool = subject.pool
    held = {n: sum(name in pool._block_of for name in names_of([n] * 16, 4)) for n in (1, 2, 3)}
    assert held == {1: 4, 2: 1, 3: 4}
    assert names_of([2] * 16, 1)[0] in pool._block_of


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_pool_does_what_a_list_of_blocks_by_last_use_does(data):
    pool = BlockPool(num_blocks=BLOCKS, block_size=BLOCK)
    sequences, kept, named = [], [], {}  # [tokens, blocks]; blocks by last use; block -> name
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["begin", "begin", "grow", "fill", "release"]))
        before = list(pool._kept)
        assert before == kept
        if action == "begin":
            length = data.draw(st.integers(1, FITS // 2))
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
            names, found = names_of(tokens, (length - 1) // BLOCK), []
            for name in names:
                match = [block for block, one in named.items() if one == name]
                if not match:
                    break
                found += match
            blocks = []
            expected = data.draw(st.integers(0, FITS))
            got = pool.begin(blocks, length, names=names, expected=expected)
            held = {block for _, mine in sequences for block in mine} | set(found)
            if -(-length // BLOCK) - len(found) > BLOCKS - len(held):
                assert got is None
                assert not blocks
                assert list(pool._kept) == before
                continue
            assert got == len(found)
            assert blocks[:got] == found
            assert held.isdisjoint(blocks[got:])
            sequences.append([tokens, blocks])
            kept = [block for block in kept if block not in found]
        elif not sequences:
            continue
        elif action == "grow":
            tokens, blocks = data.draw(st.sampled_from(sequences))
            more, had = data.draw(st.integers(1, 2 * BLOCK)), list(blocks)
            fits = -(-(len(tokens) + more) // BLOCK) - len(blocks) <= pool.num_free
            assert pool.grow(blocks, len(tokens) + more) == fits
            assert blocks[: len(had)] == had
            if fits:
                tokens += [0] * more
        elif action == "fill":
            tokens, blocks = data.draw(st.sampled_from(sequences))
            full = len(tokens) // BLOCK
            for block, name in zip(blocks, names_of(tokens, full)):
                pool.name(block, name)
                if name not in named.values():
                    named[block] = name
        else:
            index = data.draw(st.integers(0, len(sequences) - 1))
            _, blocks = sequences.pop(index)
            others = {block for _, mine in sequences for block in mine}
            kept += [b for b in reversed(blocks) if b not in others and b in named]
            pool.release(blocks)
        # Given up were the oldest ones.
        given_up = len(kept) - len(pool._kept)
        assert given_up >= 0
        for block in kept[:given_up]:
            del named[block]
        kept = kept[given_up:]
        assert list(pool._kept) == kept
        assert pool._name_of == named
        held = {block for _, mine in sequences for block in mine}
        assert pool.num_free == BLOCKS - len(held)
    for _, blocks in sequences:
        pool.release(blocks)
    assert pool.num_free == BLOCKS
    assert not pool._ends
    assert not pool._expected.any()
