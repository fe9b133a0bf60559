"""The recorder's counts equal a brute-force count of the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.errors import ArtifactError, BackendError
from semantic_ep.observe.counters import CounterLimits, RoutedTokens, RoutingCounters
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.recorder import RoutingRecorder, _Worker
from semantic_ep.observe.traces import RoutingTrace

LAYERS, EXPERTS, TOP_K, VOCAB = 3, 6, 2, 11
FINGERPRINT = ModelFingerprint(
    architecture="toy", layer_ids=tuple(range(LAYERS)), num_experts=EXPERTS, top_k=TOP_K
)


def make_recorder(**options):
    return RoutingRecorder(
        num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, vocab_size=VOCAB, **options
    )


def random_routes(rng, tokens):
    """[T, L, K] distinct experts a token, and [T] token ids."""
    routes = rng.random((tokens, LAYERS, EXPERTS)).argsort(axis=2)[:, :, :TOP_K]
    return routes, rng.integers(0, VOCAB, tokens)


def feed(recorder, routes, ids, **context):
    """Play one forward pass of a model in training."""
    context = {key: torch.as_tensor(value) for key, value in context.items()}
    recorder.start_micro_batch(torch.as_tensor(ids), **context)
    for layer in range(LAYERS):
        recorder.record(layer, torch.as_tensor(routes[:, layer]))


def expected_profile(routes, ids, offsets):
    trace = RoutingTrace(
        fingerprint=FINGERPRINT,
        experts=routes.astype(np.uint8),
        offsets=np.asarray(offsets, dtype=np.int64),
        token_id=ids.astype(np.int32),
    )
    return RoutingProfile.from_trace(trace, vocab_size=VOCAB)


def assert_same_counts(profile, expected):
    np.testing.assert_array_equal(profile.load, expected.load)
    np.testing.assert_array_equal(profile.token_count, expected.token_count)
    np.testing.assert_array_equal(profile.coactivation, expected.coactivation)
    np.testing.assert_array_equal(profile.transition, expected.transition)
    for mine, theirs in zip(profile.token_expert, expected.token_expert, strict=True):
        np.testing.assert_array_equal(mine.toarray(), theirs.toarray())
    assert profile.tokens == expected.tokens
    assert not profile.dropped_mass.any()

    def rows(loads):
        return sorted(loads.reshape(len(loads), -1).tolist())

    assert rows(profile.sequence_load) == rows(expected.sequence_load)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), data=st.data())
def test_counts_equal_brute_force_under_accumulation_padding_and_packing(seed, data):
    rng = np.random.default_rng(seed)
    recorder = make_recorder()
    kept_routes, kept_ids, lengths = [], [], []
    for _ in range(data.draw(st.integers(1, 3), "steps")):
        for _ in range(data.draw(st.integers(1, 3), "micro-batches")):
            tokens = data.draw(st.integers(1, 12), "tokens")
            routes, ids = random_routes(rng, tokens)
            mask = rng.random(tokens) < 0.7
            mask[0] = True
            sequence = np.sort(rng.integers(0, 3, tokens))
            feed(recorder, routes, ids, mask_T=mask, sequence_T=sequence)
            kept_routes.append(routes[mask])
            kept_ids.append(ids[mask])
            lengths += [n for n in np.bincount(sequence[mask]) if n]
        recorder.step()
    expected = expected_profile(
        np.concatenate(kept_routes), np.concatenate(kept_ids), np.cumsum([0, *lengths])
    )
    assert_same_counts(recorder.profile(FINGERPRINT), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_activations_are_not_counted_again(use_reentrant):
    recorder = make_recorder()
    routes, ids = random_routes(np.random.default_rng(0), 9)
    calls = []

    def layer(x, index):
        calls.append(index)
        recorder.record(index, torch.as_tensor(routes[:, index]))
        return x * x

    outputs = []
    for _ in range(2):  # As in a pipeline: both forward passes, then both backward passes.
        recorder.start_micro_batch(torch.as_tensor(ids))
        x = torch.ones(1, requires_grad=True)
        for index in range(LAYERS):
            x = checkpoint(layer, x, index, use_reentrant=use_reentrant)
        outputs.append(x)
    for x in outputs:
        x.backward()
    recorder.step()
    assert len(calls) == 4 * LAYERS
    profile = recorder.profile(FINGERPRINT)
    assert profile.tokens == 18
    assert profile.load.sum() == 18 * LAYERS * TOP_K


def test_calls_that_bring_their_token_ids_need_no_open_micro_batch():
    recorder, rng = make_recorder(), np.random.default_rng(9)
    passes = [random_routes(rng, 7) for _ in range(3)]
    for routes, ids in passes:
        ids_T, mask_T = torch.as_tensor(ids), torch.as_tensor(ids >= 0)
        for layer in range(LAYERS):
            recorder.record(
                layer, torch.as_tensor(routes[:, layer]), token_id_T=ids_T, mask_T=mask_T
            )
    recorder.step()
    routes, ids = (np.concatenate(arrays) for arrays in zip(*passes, strict=True))
    assert_same_counts(recorder.profile(FINGERPRINT), expected_profile(routes, ids, [0, 7, 14, 21]))


def test_sequences_may_interleave_as_in_sequence_first_layouts():
    recorder = make_recorder()
    routes, ids = random_routes(np.random.default_rng(10), 12)
    feed(recorder, routes, ids, sequence_T=np.tile([0, 1, 2], 4))
    recorder.step()
    order = np.arange(12).reshape(4, 3).T.ravel()
    expected = expected_profile(routes[order], ids[order], [0, 4, 8, 12])
    assert_same_counts(recorder.profile(FINGERPRINT), expected)


def test_passes_that_are_not_training_are_not_counted():
    recorder = make_recorder()
    routes, ids = random_routes(np.random.default_rng(1), 5)
    recorder.record(0, torch.as_tensor(routes[:, 0]))
    feed(recorder, routes, ids)
    recorder.ignore_pass()
    for layer in range(LAYERS):
        recorder.record(layer, torch.as_tensor(routes[:, layer]))
    recorder.step()
    assert recorder.profile(FINGERPRINT).tokens == 5


def test_unfinished_steps_are_not_in_the_profile():
    recorder = make_recorder()
    routes, ids = random_routes(np.random.default_rng(2), 5)
    feed(recorder, routes, ids)
    assert recorder.profile(FINGERPRINT).tokens == 0
    recorder.step()
    assert recorder.profile(FINGERPRINT).tokens == 5


def test_counts_lose_half_their_weight_in_a_half_life():
    recorder = make_recorder(halflife_steps=2)
    routes, ids = random_routes(np.random.default_rng(3), 8)
    for _ in range(200):  # Far beyond the point where the growing weight is scaled back.
        feed(recorder, routes, ids)
        recorder.step()
    weights = sum(2.0 ** (-age / 2) for age in range(1, 201))
    profile = recorder.profile(FINGERPRINT)
    once = expected_profile(routes, ids, [0, 8])
    assert profile.tokens == pytest.approx(8 * weights)
    np.testing.assert_allclose(profile.load, once.load * weights)
    np.testing.assert_allclose(profile.transition, once.transition * weights)
    np.testing.assert_allclose(
        profile.token_expert[0].toarray(), once.token_expert[0].toarray() * weights, rtol=1e-5
    )


def test_dropped_activations_count_nowhere():
    recorder = make_recorder()
    routes, ids = random_routes(np.random.default_rng(4), 6)
    routes[2, 1, 0] = routes[4, 1] = -1
    feed(recorder, routes, ids)
    recorder.step()
    profile = recorder.profile(FINGERPRINT)
    assert profile.load.sum(axis=1).tolist() == [12, 9, 12]
    assert profile.token_expert[1].sum() == 9
    assert profile.coactivation[1].sum() == 2 * 4
    assert profile.transition[0].sum() == 4 * 4 + 2


def test_memory_stays_bounded_and_the_dropped_mass_is_stated():
    vocab, limits = 4000, CounterLimits(table_bytes=64_000, max_sequences=7)
    counters = RoutingCounters(
        num_layers=1, num_experts=EXPERTS, top_k=TOP_K, vocab_size=vocab, limits=limits
    )
    rng = np.random.default_rng(5)
    exact = np.zeros((vocab, EXPERTS))
    for _ in range(60):
        ids = np.minimum(rng.zipf(1.3, 500), vocab - 1)
        routes = np.stack([ids % EXPERTS, (ids + 1 + ids // 7 % 5) % EXPERTS], axis=1)
        np.add.at(exact, (ids[:, None], routes), 1)
        counters.add(
            RoutedTokens(experts={0: routes}, token_id=ids, sequence=np.zeros(500, np.int64))
        )
        counters.step()
        table = counters.part("table.0")
        assert 16 * len(table["cells"]) <= limits.table_bytes
    fingerprint = ModelFingerprint(
        architecture="toy", layer_ids=(0,), num_experts=EXPERTS, top_k=TOP_K
    )
    profile = counters.profile(
        {name: counters.part(name) for name in counters.part_names()}, fingerprint
    )
    kept = profile.token_expert[0].toarray()
    assert 0 < profile.dropped_mass[0] < 0.5
    assert kept.sum() == pytest.approx(exact.sum() * (1 - profile.dropped_mass[0]))
    frequent = exact > np.sort(exact.ravel())[-50]
    np.testing.assert_array_equal(kept[frequent], exact[frequent])
    assert len(profile.sequence_load) == 7


def test_rare_cells_can_be_left_out_and_count_as_dropped():
    recorder = make_recorder()
    routes = np.zeros((4, LAYERS, TOP_K), int)
    routes[:, :, 1] = [[1], [1], [1], [2]]
    feed(recorder, routes, np.array([3, 3, 3, 3]))
    recorder.step()
    profile = recorder.profile(FINGERPRINT, min_count=2)
    assert profile.token_expert[0].toarray()[3].tolist() == [4, 3, 0, 0, 0, 0]
    assert profile.dropped_mass == pytest.approx([1 / 8] * LAYERS)


def test_sampled_sequences_of_two_processes_combine_into_a_random_sample():
    kept = np.zeros(40)
    for seed in range(150):
        sides = []
        for side in (0, 1):
            counters = RoutingCounters(
                num_layers=1,
                num_experts=40,
                top_k=1,
                vocab_size=1,
                seed=2 * seed + side,
                limits=CounterLimits(max_sequences=5),
            )
            mine = np.arange(20 * side, 20 * side + 20)
            counters.add(
                RoutedTokens(
                    experts={0: mine[:, None]},
                    token_id=np.zeros(20, np.int64),
                    sequence=np.arange(20),
                )
            )
            sides.append(counters)
        combined = sides[0].combine("sequences", *(side.part("sequences") for side in sides))
        assert len(combined["key"]) == 5
        kept += combined["load"].sum(axis=(0, 1))
    assert kept.sum() == 150 * 5
    # 150 draws of 5 from 40: each sequence 18.75 times, standard deviation 4.05.
    assert kept.min() > 18.75 - 5 * 4.05
    assert kept.max() < 18.75 + 5 * 4.05


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_processes_that_see_parts_of_a_batch_combine_to_one_that_sees_all_of_it(seed):
    rng = np.random.default_rng(seed)
    limits = CounterLimits(max_sequences=5)
    shape = {"num_layers": LAYERS, "num_experts": EXPERTS, "top_k": TOP_K, "vocab_size": VOCAB}
    whole = RoutingCounters(**shape, limits=limits)
    stages = ((0,), (1, 2))  # Each layer is counted by one of two stages,
    parts = [
        (layers, half, RoutingCounters(**shape, limits=limits, layers=layers, counts_tokens=not i))
        for i, layers in enumerate(stages)
        for half in (0, 1)  # and each token by one of two ranks.
    ]
    for _ in range(4):
        routes, ids = random_routes(rng, 16)
        sequence, side = np.sort(rng.integers(0, 6, 16)), rng.integers(0, 2, 16)

        def routed(tokens, layers, routes=routes, ids=ids, sequence=sequence):
            return RoutedTokens(
                experts={layer: routes[tokens, layer] for layer in layers},
                token_id=ids[tokens],
                sequence=sequence[tokens],
            )

        whole.add(routed(slice(None), range(LAYERS)))
        for layers, half, counters in parts:
            counters.add(routed(side == half, [*range(layers[0])[-1:], *layers]))
    combined = {}
    for name in whole.part_names():
        first, *others = (counters.part(name) for _, _, counters in parts)
        for other in others:
            first = whole.combine(name, first, other)
        combined[name] = first
    found = whole.profile(combined, FINGERPRINT)
    expected = whole.profile({name: whole.part(name) for name in combined}, FINGERPRINT)
    assert len(expected.sequence_load) == 5
    assert_same_counts(found, expected)


def test_a_sampled_trace_holds_whole_sequences_within_its_limit():
    recorder = make_recorder(limits=CounterLimits(sample_tokens=20))
    rng = np.random.default_rng(6)
    truth = {}
    for _ in range(10):
        routes, ids = random_routes(rng, 12)
        feed(recorder, routes, ids, sequence_T=np.repeat([0, 1], 6))
        recorder.step()
        for half in (slice(0, 6), slice(6, 12)):
            truth[ids[half].tobytes()] = routes[half]
    trace = recorder.trace(FINGERPRINT)
    assert trace.num_tokens == 18
    for start, stop in zip(trace.offsets[:-1], trace.offsets[1:], strict=True):
        key = trace.token_id[start:stop].astype(np.int64).tobytes()
        np.testing.assert_array_equal(trace.experts[start:stop], truth[key])


def test_a_resumed_run_goes_on_from_the_saved_profile(tmp_path):
    rng = np.random.default_rng(7)
    first, second, whole = make_recorder(), make_recorder(), make_recorder()
    for recorder in (first, second):
        routes, ids = random_routes(rng, 30)
        for target in (recorder, whole):
            feed(target, routes, ids)
            target.step()
        if recorder is first:
            first.profile(FINGERPRINT).save(tmp_path / "profile")
            second.counters.restore(RoutingProfile.read(tmp_path / "profile"))
    assert_same_counts(second.profile(FINGERPRINT), whole.profile(FINGERPRINT))


def test_a_profile_of_another_model_is_refused_on_resume():
    other = RoutingRecorder(num_layers=LAYERS, num_experts=8, top_k=2, vocab_size=VOCAB)
    fingerprint = ModelFingerprint(
        architecture="toy", layer_ids=tuple(range(LAYERS)), num_experts=8, top_k=2
    )
    with pytest.raises(ArtifactError, match="another model"):
        make_recorder().counters.restore(other.profile(fingerprint))


def test_routers_and_inputs_of_different_lengths_are_an_error():
    recorder = make_recorder()
    routes, ids = random_routes(np.random.default_rng(8), 5)
    feed(recorder, routes, ids[:4])
    with pytest.raises(BackendError, match=r"different numbers of tokens.*token ids: 4"):
        recorder.step()


def in_background(recorder):
    """Count as where routes arrive from an accelerator."""
    recorder._worker = _Worker(recorder.counters)
    return recorder


def test_counting_in_the_background_counts_the_same():
    here, there = make_recorder(), in_background(make_recorder())
    rng = np.random.default_rng(11)
    for _ in range(20):
        routes, ids = random_routes(rng, 15)
        for recorder in (here, there):
            feed(recorder, routes, ids)
            recorder.step()
    assert_same_counts(there.profile(FINGERPRINT), here.profile(FINGERPRINT))


def test_a_failure_in_the_background_stops_the_run():
    recorder = in_background(make_recorder())
    routes, ids = random_routes(np.random.default_rng(12), 5)
    feed(recorder, routes, ids[:4])
    recorder.step()
    with pytest.raises(BackendError, match="the routing recorder failed"):
        recorder.flush()
    with pytest.raises(BackendError, match="the routing recorder failed"):
        recorder.step()


def test_a_window_samples_the_sequences_since_it_was_opened_and_leaves_the_profile_alone():
    rng = np.random.default_rng(3)
    recorder = make_recorder()
    before, ids = random_routes(rng, 6)
    feed(recorder, before, ids)
    recorder.step()
    recorder.start_window(10)
    passes = [random_routes(rng, 8) for _ in range(3)]
    for routes, ids_of_pass in passes:
        feed(recorder, routes, ids_of_pass, sequence_T=[0] * 4 + [1] * 4)
        recorder.step()
    trace, tokens = recorder.window(FINGERPRINT)
    assert tokens == 24
    assert np.diff(trace.offsets).tolist() == [4, 4]  # Whole ones: a third would pass the bound.
    seen = {
        half.tobytes() for routes, _ in passes for half in np.split(routes.astype(np.uint16), 2)
    }
    assert {part.tobytes() for part in np.split(trace.experts, 2)} <= seen
    assert recorder.profile(FINGERPRINT).tokens == 30
    recorder.start_window(10)
    assert recorder.window(FINGERPRINT)[1] == 0
