"""Traces and loads recorded by other tools are read exactly."""

import base64
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.errors import ArtifactError
from semantic_ep.observe.formats import (
    read_logical_count,
    read_megatron_trace,
    read_npz_trace,
    read_sglang_trace,
    read_vllm_trace,
    write_logical_count,
    write_megatron_trace,
    write_npz_trace,
    write_vllm_trace,
)
from semantic_ep.observe.traces import RoutingTrace
from tests.unit.observe.sglang_dumps import sglang_dump


def make_trace(seed=0, lengths=(3, 5), layer_ids=(1, 2, 3), experts=8, top_k=2, requests=True):
    rng = np.random.default_rng(seed)
    tokens = sum(lengths)
    routes = rng.random((tokens, len(layer_ids), experts)).argsort(axis=2)[:, :, :top_k]
    return RoutingTrace(
        fingerprint=ModelFingerprint(
            architecture="toy", layer_ids=layer_ids, num_experts=experts, top_k=top_k
        ),
        experts=routes.astype(np.uint8),
        offsets=np.cumsum([0, *lengths]),
        token_id=rng.integers(-1, 50, tokens).astype(np.int32),
        requests=tuple({"n": n} for n in lengths) if requests else (),
    )


def assert_same_routes(found, expected):
    np.testing.assert_array_equal(found.experts, expected.experts)
    np.testing.assert_array_equal(found.offsets, expected.offsets)
    assert found.fingerprint.num_experts == expected.fingerprint.num_experts
    assert found.fingerprint.top_k == expected.fingerprint.top_k


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_npz_round_trip(tmp_path_factory, seed, lengths):
    trace = make_trace(seed, lengths=tuple(lengths))
    path = tmp_path_factory.mktemp("npz") / "toy.npz"
    write_npz_trace(trace, path)
    found = read_npz_trace(path, num_experts=8)
    assert_same_routes(found, trace)
    np.testing.assert_array_equal(found.token_id, trace.token_id)
    assert found.requests == trace.requests


def test_npz_keeps_layer_numbers_and_takes_stated_ones(tmp_path):
    trace = make_trace(layer_ids=(1, 2, 4))
    write_npz_trace(trace, tmp_path / "toy.npz")
    assert read_npz_trace(tmp_path / "toy.npz").fingerprint.layer_ids == (1, 2, 4)
    found = read_npz_trace(tmp_path / "toy.npz", layer_ids=(3, 4, 5))
    assert found.fingerprint.layer_ids == (3, 4, 5)


@pytest.mark.parametrize("stated", [(1, 2), (1, 2, 3, 4), (2, 1, 3), (1, 1, 2)])
def test_stated_layers_must_be_as_many_as_recorded_and_rise(tmp_path, stated):
    write_npz_trace(make_trace(), tmp_path / "toy.npz")
    with pytest.raises(ArtifactError, match="3 rising layer numbers"):
        read_npz_trace(tmp_path / "toy.npz", layer_ids=stated)


def test_npz_without_token_ids_marks_every_token_unknown(tmp_path):
    trace = make_trace()
    np.savez(tmp_path / "bare.npz", experts=trace.experts, offsets=trace.offsets)
    assert (read_npz_trace(tmp_path / "bare.npz").token_id == -1).all()


@pytest.mark.parametrize(("largest", "inferred"), [(31, 32), (59, 60), (62, 64), (255, 256)])
def test_number_of_experts_is_inferred_from_the_largest_id(tmp_path, largest, inferred):
    routes = np.array([[[largest, 0]]], dtype=np.uint8)
    np.savez(tmp_path / "t.npz", experts=routes, offsets=[0, 1])
    assert read_npz_trace(tmp_path / "t.npz").fingerprint.num_experts == inferred


def test_stated_number_of_experts_must_cover_the_ids(tmp_path):
    np.savez(tmp_path / "t.npz", experts=np.full((1, 1, 1), 9, np.uint8), offsets=[0, 1])
    with pytest.raises(ArtifactError, match="exceeds the stated number"):
        read_npz_trace(tmp_path / "t.npz", num_experts=8)


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_unreadable_npz_is_an_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "broken.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"broken\.npz"):
        read_npz_trace(path)


def test_npz_with_request_lines_that_do_not_fit_is_refused(tmp_path):
    write_npz_trace(make_trace(), tmp_path / "toy.npz")
    (tmp_path / "toy.requests.jsonl").write_text("{}\n")
    with pytest.raises(ArtifactError, match="do not fit the trace"):
        read_npz_trace(tmp_path / "toy.npz")


def test_megatron_round_trip_keeps_routes_requests_and_layer_numbers(tmp_path):
    trace = make_trace(layer_ids=(1, 3, 4))
    write_megatron_trace(trace, tmp_path)
    found = read_megatron_trace(tmp_path, num_experts=8)
    assert_same_routes(found, trace)
    assert found.fingerprint.layer_ids == (1, 3, 4)
    assert (found.token_id == -1).all()


def test_megatron_layers_of_a_later_pipeline_stage_are_renumbered(tmp_path):
    write_megatron_trace(make_trace(layer_ids=(0, 1, 2)), tmp_path)
    found = read_megatron_trace(tmp_path, layer_ids=(13, 14, 15))
    assert found.fingerprint.layer_ids == (13, 14, 15)


def test_megatron_micro_batches_and_ranks_become_requests_of_their_own(tmp_path):
    def record(rank, layer, routes, **extra):
        return json.dumps(
            {"step": 0, "block": "decoder", "layer": layer, "rank": rank, "topk": 1, **extra}
            | {"top_indices": routes}
        )

    mtp = json.dumps({"step": 0, "block": "mtp", "layer": 0, "rank": 0, "mtp_idx": 0})
    (tmp_path / "router_trace_rank0.jsonl").write_text(
        "\n".join(
            [
                record(0, 0, [[1]]),
                record(0, 1, [[2]]),
                mtp,
                record(0, 0, [[3], [0]]),
                record(0, 1, [[1], [2]]),
            ]
        )
    )
    (tmp_path / "router_trace_rank1.jsonl").write_text(
        "\n".join([record(1, 0, [[0]]), record(1, 1, [[0]])])
    )
    found = read_megatron_trace(tmp_path)
    assert found.experts[:, :, 0].tolist() == [[1, 2], [3, 1], [0, 2], [0, 0]]
    assert found.offsets.tolist() == [0, 1, 3, 4]
    assert [request["rank"] for request in found.requests] == [0, 0, 1]


def test_megatron_trace_cut_in_the_middle_of_a_step_is_refused(tmp_path):
    write_megatron_trace(make_trace(), tmp_path)
    file = tmp_path / "router_trace_rank0.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[:-1]))
    with pytest.raises(ArtifactError, match="different layers"):
        read_megatron_trace(tmp_path)


def test_megatron_line_cut_in_the_middle_is_named(tmp_path):
    (tmp_path / "router_trace_rank0.jsonl").write_text('{"step": 0, "lay')
    with pytest.raises(ArtifactError, match=r"rank0.jsonl:1"):
        read_megatron_trace(tmp_path)


def test_logical_count_round_trip_leaves_dense_layers_out(tmp_path):
    load = np.array([[3.0, 1, 0, 4], [2, 2, 2, 2]])
    write_logical_count(load, tmp_path / "load.json", layer_ids=(3, 4))
    found, layers = read_logical_count(tmp_path / "load.json")
    np.testing.assert_array_equal(found, load)
    assert layers == (3, 4)
    assert len(json.loads((tmp_path / "load.json").read_text())["logical_count"]) == 5


def test_logical_count_of_a_stat_dump_is_summed_over_steps(tmp_path):
    torch = pytest.importorskip("torch")
    steps = np.random.default_rng(0).integers(1, 9, (5, 2, 4))
    torch.save({"rank": 0, "logical_count": torch.tensor(steps)}, tmp_path / "dump.pt")
    found, _ = read_logical_count(tmp_path / "dump.pt")
    np.testing.assert_array_equal(found, steps.sum(axis=0))


def test_a_file_without_counts_is_refused(tmp_path):
    (tmp_path / "load.json").write_text('{"count": []}')
    with pytest.raises(ArtifactError, match="logical_count"):
        read_logical_count(tmp_path / "load.json")


def test_sglang_per_token_dump_is_read_in_logical_ids(tmp_path):
    torch = pytest.importorskip("torch")
    trace = make_trace()
    torch.save(sglang_dump(trace), tmp_path / "a_0.pt")
    torch.save(sglang_dump(trace, rank=1), tmp_path / "a_1.pt")
    found = read_sglang_trace(tmp_path, num_experts=8)
    assert_same_routes(found, trace)
    np.testing.assert_array_equal(found.token_id, trace.token_id)
    assert found.fingerprint.layer_ids == (1, 2, 3)


def test_sglang_decode_tokens_are_requests_of_one_token(tmp_path):
    torch = pytest.importorskip("torch")
    trace = make_trace()
    torch.save(sglang_dump(trace, decode=True), tmp_path / "a.pt")
    assert read_sglang_trace(tmp_path / "a.pt").num_requests == trace.num_tokens


def test_sglang_dump_of_another_mode_names_the_flag(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"logical_count": torch.ones(1, 2)}, tmp_path / "a.pt")
    with pytest.raises(ArtifactError, match="per_token"):
        read_sglang_trace(tmp_path / "a.pt")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    torch = pytest.importorskip("torch")

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"records": Hostile()}, tmp_path / "a.pt")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_sglang_trace(tmp_path / "a.pt")
    assert not (tmp_path / "owned").exists()


def test_vllm_round_trip(tmp_path):
    trace = make_trace(layer_ids=(0, 1, 2))
    write_vllm_trace(trace, tmp_path / "responses.jsonl")
    found = read_vllm_trace(tmp_path / "responses.jsonl", num_experts=8)
    assert_same_routes(found, trace)
    np.testing.assert_array_equal(found.token_id, trace.token_id)


def test_vllm_layers_that_were_not_captured_are_left_out(tmp_path):
    prompt = [[[0, 0], [1, 2], [0, 3]], [[0, 0], [2, 1], [1, 0]]]
    line = json.dumps({"prompt_routed_experts": prompt, "choices": [{"index": 0}]})
    (tmp_path / "r.jsonl").write_text(line)
    found = read_vllm_trace(tmp_path / "r.jsonl")
    assert found.fingerprint.layer_ids == (1, 2)
    assert found.experts.tolist() == [layers[1:] for layers in prompt]
    assert read_vllm_trace(tmp_path / "r.jsonl", layer_ids=(3, 4)).fingerprint.layer_ids == (3, 4)


def test_vllm_without_any_route_is_refused(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"prompt_routed_experts": [[[0, 0]]], "choices": [{}]}')
    with pytest.raises(ArtifactError, match="no layer has a route"):
        read_vllm_trace(tmp_path / "r.jsonl")


def test_vllm_choices_continue_their_prompt_and_the_last_token_has_no_route(tmp_path):
    prompt, generated = [[[1, 2]], [[3, 4]]], [[[5, 6]]]
    buffer = io.BytesIO()
    np.save(buffer, np.array(generated, dtype=np.int16))
    response = {
        "prompt_token_ids": [10, 11],
        "prompt_routed_experts": prompt,
        "choices": [
            {"index": 0, "token_ids": [12, 13], "routed_experts": generated},
            {"index": 1, "token_ids": [14, 15],
             "routed_experts": base64.b64encode(buffer.getvalue()).decode()},
        ],
    }  # fmt: skip
    (tmp_path / "r.jsonl").write_text(json.dumps(response))
    found = read_vllm_trace(tmp_path / "r.jsonl")
    assert found.experts[:, 0].tolist() == [[1, 2], [3, 4], [5, 6]] * 2
    assert found.token_id.tolist() == [10, 11, 12, 10, 11, 14]


def test_vllm_response_without_routes_names_the_flag(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"choices": [{"routed_experts": null}]}')
    with pytest.raises(ArtifactError, match="enable-return-routed-experts"):
        read_vllm_trace(tmp_path / "r.jsonl")
