import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.errors import ArtifactError
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace


def random_trace(seed, *, requests=5, layers=3, experts=6, top_k=2, vocab=9):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, 12, requests)
    tokens = int(lengths.sum())
    routes = np.argsort(generator.random((tokens, layers, experts)), axis=2)[:, :, :top_k]
    return RoutingTrace(
        fingerprint=ModelFingerprint(
            architecture="test", layer_ids=tuple(range(layers)), num_experts=experts, top_k=top_k
        ),
        experts=routes.astype(np.uint8),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        token_id=generator.integers(-1, vocab, tokens).astype(np.int32),
        requests=tuple({"kind": f"k{i}"} for i in range(requests)),
    )


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_a_profile_counts_what_a_loop_over_tokens_counts(seed):
    trace = random_trace(seed)
    profile = RoutingProfile.from_trace(trace, vocab_size=9)
    layers, experts = 3, 6
    load = np.zeros((layers, experts))
    table = np.zeros((layers, 9, experts))
    together = np.zeros((layers, experts, experts))
    transition = np.zeros((layers - 1, experts, experts))
    for token, routes in zip(trace.token_id, trace.experts, strict=True):
        for layer in range(layers):
            for a in routes[layer]:
                load[layer, a] += 1
                if token >= 0:
                    table[layer, token, a] += 1
                for b in routes[layer]:
                    together[layer, a, b] += a != b
                if layer:
                    for before in routes[layer - 1]:
                        transition[layer - 1, before, a] += 1
    np.testing.assert_array_equal(profile.load, load)
    np.testing.assert_array_equal([t.toarray() for t in profile.token_expert], table)
    np.testing.assert_array_equal(profile.coactivation, together)
    np.testing.assert_array_equal(profile.transition, transition)
    np.testing.assert_array_equal(profile.sequence_load.sum(axis=0), load)
    assert profile.tokens == trace.num_tokens


def test_profiles_and_traces_round_trip_on_disk(tmp_path):
    trace = random_trace(1)
    trace.save(tmp_path / "trace")
    again = RoutingTrace.load(tmp_path / "trace")
    assert again.requests == trace.requests
    np.testing.assert_array_equal(again.experts, trace.experts)
    profile = RoutingProfile.from_trace(trace)
    digest = profile.save(tmp_path / "profile")
    read = RoutingProfile.read(tmp_path / "profile")
    assert read.sha256 == digest
    for field in ("load", "token_count", "coactivation", "transition", "sequence_load"):
        np.testing.assert_array_equal(getattr(read, field), getattr(profile, field))
    for mine, theirs in zip(profile.token_expert, read.token_expert, strict=True):
        assert (mine != theirs).nnz == 0
    assert (read.tokens, read.meta) == (profile.tokens, profile.meta)


def test_a_split_keeps_every_request_whole_and_exactly_once():
    trace = random_trace(2, requests=10)
    first, second = trace.split(0.3, seed=4)
    assert (first.num_requests, second.num_requests) == (3, 7)
    kinds = [request["kind"] for request in first.requests + second.requests]
    assert sorted(kinds) == sorted(request["kind"] for request in trace.requests)
    for part in (first, second):
        for i, request in enumerate(part.requests):
            original = int(request["kind"][1:])
            np.testing.assert_array_equal(
                part.experts[part.request_of_token == i],
                trace.experts[trace.request_of_token == original],
            )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"offsets": np.array([0, 3])}, "not all tokens"),
        ({"token_id": np.zeros(1, np.int32)}, "token ids for"),
        ({"experts": None}, "expected"),
    ],
)
def test_malformed_traces_are_refused(change, problem):
    trace = random_trace(3)
    if change.get("experts", 0) is None:
        change = {"experts": trace.experts[:, :2]}
    with pytest.raises(ArtifactError, match=problem):
        dataclasses.replace(trace, **change)


def test_an_expert_id_beyond_the_model_is_refused():
    trace = random_trace(3)
    routes = trace.experts.copy()
    routes[0, 0, 0] = 6
    with pytest.raises(ArtifactError, match="expert id 6 of 6"):
        dataclasses.replace(trace, experts=routes)
