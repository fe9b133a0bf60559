import importlib.util
import inspect

import numpy as np
import pytest
import torch
import torch.distributed as dist

from semantic_ep.errors import BackendError
from semantic_ep.runtime.backends import DispatchCall
from semantic_ep.runtime.deepep import DeepEPBackend, buffer_class
from semantic_ep.runtime.deepep_dispatch import DeepEPDispatcher
from semantic_ep.runtime.stats import DispatchStats
from semantic_ep.runtime.torch_dispatch import TorchDispatcher
from tests.distributed import deepep_standin
from tests.distributed.launcher import run_ranks
from tests.distributed.test_dispatch import Case, run_experts

pytestmark = pytest.mark.distributed

CASES = [
    Case(tokens=(5, 0, 7, 2), slots=4, top_k=4, dtype=torch.float32),
    Case(tokens=(0, 0, 0, 0), dtype=torch.float32),
    Case(tokens=(30, 31, 32, 0), slots=2, top_k=8, dropped=0.2, seed=1, dtype=torch.float32),
    Case(tokens=(3, 3, 3, 3), hot_rank=2, slots=4, top_k=3, seed=2, dtype=torch.bfloat16),
    Case(tokens=(4, 4, 4, 4), dropped=1.0, dtype=torch.bfloat16),
]


def _pass(make, case, rank, ranks):
    """(rows, weights, output, gradients of x and weights) of one exchange, and its counters."""
    stats = DispatchStats(num_layers=1, ep_size=ranks, slots_per_rank=case.slots, rank=rank)
    dispatcher = make(group=dist.group.WORLD, slots_per_rank=case.slots, stats=stats)
    x, slot, weight = case.inputs(rank, ranks)
    x, weight = x.requires_grad_(), weight.float().requires_grad_()
    dispatched = dispatcher.dispatch(x, slot, weight)
    y = run_experts(dispatched.rows_RD, dispatched.tokens_per_slot_S, rank, case.slots)
    out = dispatcher.combine(y, dispatched)
    slot.fill_(0)  # the caller's to reuse, before gradients have come home
    probe = torch.randn(x.shape, generator=torch.Generator().manual_seed(rank)).to(case.dtype)
    (out * probe).sum().backward()
    return (dispatched.rows_RD, dispatched.weight_R, out, x.grad, weight.grad), stats


def _equals_torch(rank, ranks):
    def deepep(**arguments):
        return DeepEPDispatcher(deepep_standin, **arguments, max_tokens=None)

    for case in CASES:
        mine, my_stats = _pass(deepep, case, rank, ranks)
        theirs, their_stats = _pass(TorchDispatcher, case, rank, ranks)
        for got, want in zip(mine[:3], theirs[:3], strict=True):
            assert torch.equal(got, want), case
        for got, want in zip(mine[3:], theirs[3:], strict=True):
            tolerance = 1e-5 if case.dtype == torch.float32 else 0.05
            assert torch.allclose(got, want, rtol=tolerance, atol=tolerance), case
        got, want = my_stats.snapshot(), their_stats.snapshot()
        for name in got.keys() - {"bytes_metadata"}:
            assert np.array_equal(got[name], want[name]), (case, name)


def test_rows_outputs_gradients_and_counters_equal_those_of_the_torch_backend():
    run_ranks(_equals_torch, 4)


def _buffers_grow(rank, ranks):
    stats = DispatchStats(num_layers=1, ep_size=ranks, slots_per_rank=1, rank=rank)
    common = {"group": dist.group.WORLD, "slots_per_rank": 1, "stats": stats}
    growing = DeepEPDispatcher(deepep_standin, **common, max_tokens=None)
    fixed = DeepEPDispatcher(deepep_standin, **common, max_tokens=4)
    # Rank 1 brings more: rank 0 must grow with it, and refuse with it.
    for tokens in (2, 9 * (1 + rank)):
        x = torch.full((tokens, 4), float(rank))
        slot = torch.full((tokens, 1), 1 - rank)
        dispatched = growing.dispatch(x, slot, torch.ones(tokens, 1))
        assert torch.equal(growing.combine(dispatched.rows_RD, dispatched), x)
    with pytest.raises(BackendError, match=r"got 18.*max_tokens = 4"):
        fixed.dispatch(x, slot, torch.ones(tokens, 1))


def test_buffers_hold_the_tokens_of_the_fullest_rank():
    run_ranks(_buffers_grow, 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"device_type": "cpu"}, "not on a GPU"),
        ({"dtype": torch.float32}, "bfloat16 only"),
        ({"hidden": 7168 + 128}, "no multiple of 256"),
        ({"top_k": 33}, "exceeds top-32"),
    ],
)
def test_the_verifier_knows_what_the_kernels_of_deepep_are_compiled_for(change, reason):
    call = {
        "dtype": torch.bfloat16,
        "device_type": "cuda",
        "hidden": 7168,
        "top_k": 8,
        "ep_size": 8,
        "slots_per_rank": 32,
        "needs_grad": True,
    }
    supported, said = DeepEPBackend().supports(DispatchCall(**{**call, **change}))
    assert supported == (reason is None)
    assert reason is None or reason in said


@pytest.mark.upstream
def test_the_installed_deepep_takes_every_argument_of_the_stand_in():
    if importlib.util.find_spec("deep_ep") is None:
        pytest.skip("deep_ep is not installed")
    available, reason = DeepEPBackend().is_available()
    if not available:
        pytest.skip(reason)
    import deep_ep

    theirs = buffer_class(deep_ep)
    # The stand-in refuses what it does not name, so these are all arguments that we ever pass.
    for method in ("__init__", "dispatch", "combine"):
        named = inspect.signature(getattr(deepep_standin.ElasticBuffer, method)).parameters
        assert named.keys() <= inspect.signature(getattr(theirs, method)).parameters.keys()
    assert isinstance(deep_ep.topk_idx_t, torch.dtype)
