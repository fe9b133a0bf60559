"""Operators of several ranks in one process: in the emulator, and on a GPU where there is one."""

import pytest
import torch

from benchmarks.virtual_ranks import VirtualRanks, check, random_inputs
from semantic_ep.errors import BackendError, PeerFailureError
from semantic_ep.runtime.kernels.exchange import load_library

DEVICES = [
    pytest.param("cpu", id="emulator"),
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    ),
]
SHAPES = {
    "small": {"num_ranks": 2, "slots_per_rank": 3, "tokens": 9, "topk": 2, "hidden": 24},
    "odd": {"num_ranks": 3, "slots_per_rank": 2, "tokens": 7, "topk": 3, "hidden": 13},
    "wide": {"num_ranks": 4, "slots_per_rank": 4, "tokens": 20, "topk": 8, "hidden": 520},
}


def build(shape, device, dtype, seed=0):
    try:
        load_library(device)
    except BackendError as error:
        pytest.skip(str(error))
    options = dict(shape)
    tokens = options.pop("tokens")
    ranks = VirtualRanks(**options, max_tokens=tokens, dtype=dtype, device=torch.device(device))
    inputs = random_inputs(
        **options, tokens=tokens, dtype=dtype, device=torch.device(device), seed=seed, dropped=0.1
    )
    return ranks, inputs


def expected_identity(x, weight, slot):
    """Combine of rows that experts left as they were."""
    kept = weight.double() * (slot >= 0)
    return x.double() * kept.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_rows_and_sums_are_right_when_ranks_share_a_process(device, shape, dtype):
    ranks, (x, slot, weight) = build(shape, device, dtype)
    for _ in range(3):
        received = ranks.dispatch(x, slot, weight)
        out = ranks.combine([here.rows_RD for here in received], received)
    ranks.finish()
    check(x, slot, weight, received, shape["slots_per_rank"])
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-5
    for rank, got in enumerate(out):
        want = expected_identity(x[rank], weight[rank], slot[rank])
        assert torch.allclose(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_beyond_the_fixed_buffer_are_an_error(device):
    ranks, (x, slot, weight) = build(SHAPES["small"], device, torch.float32)
    ranks.max_rows = 2
    ranks.dispatch(x, slot, weight)
    with pytest.raises((BackendError, PeerFailureError), match=r"more than max_rows|of its own"):
        ranks.finish()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_captured_graph_replays_with_new_inputs():
    shape = SHAPES["wide"]
    ranks, (x, slot, weight) = build(shape, "cuda", torch.bfloat16)

    def step():
        ranks.fork()
        received = ranks.dispatch(x, slot, weight)
        out = ranks.combine([here.rows_RD for here in received], received)
        ranks.join()
        return received, out

    step()
    ranks.finish()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        received, out = step()
    for seed in range(1, 5):
        _, fresh = build(shape, "cuda", torch.bfloat16, seed=seed)
        for buffers, values in zip((x, slot, weight), fresh, strict=True):
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)
        graph.replay()
        ranks.finish()
        check(x, slot, weight, received, shape["slots_per_rank"])
        for rank, got in enumerate(out):
            want = expected_identity(x[rank], weight[rank], slot[rank])
            assert torch.allclose(got.double(), want, rtol=0.03, atol=0.03)
