"""One process a rank: the same kernels, over shared memory, against plain collectives."""

import datetime
import os
import random
import signal
import threading
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from semantic_ep.errors import BackendError, PeerFailureError
from semantic_ep.runtime.kernels import build
from semantic_ep.runtime.kernels.dispatcher import KernelDispatcher
from semantic_ep.runtime.overlap import DeviceRates
from semantic_ep.runtime.shuffle import KernelShuffle, TorchShuffle, permutation_of
from semantic_ep.runtime.stats import DispatchStats
from tests.distributed.launcher import run_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        build.find_library("emulator").path is None, reason="the emulator library cannot be built"
    ),
]


def dispatcher_of(slots, **options):
    world = dist.group.WORLD
    stats = DispatchStats(
        num_layers=1, ep_size=world.size(), slots_per_rank=slots, rank=world.rank()
    )
    return KernelDispatcher(group=world, slots_per_rank=slots, stats=stats, **options)


def inputs_of(rank, ranks, *, tokens, hidden, slots, topk, dtype, seed):
    draw = torch.Generator().manual_seed(100 * seed + rank)
    x = torch.randn(tokens, hidden, generator=draw).to(dtype)
    slot = torch.rand(tokens, ranks * slots, generator=draw).topk(topk).indices
    slot[torch.rand(tokens, topk, generator=draw) < 0.1] = -1
    return x, slot, torch.rand(tokens, topk, generator=draw)


def exchange(value, counts_out):
    """Plain uneven all_to_all_single of rows."""
    counts_in = torch.empty_like(counts_out)
    dist.all_to_all_single(counts_in, counts_out)
    received = value.new_empty(int(counts_in.sum()), *value.shape[1:])
    dist.all_to_all_single(received, value, counts_in.tolist(), counts_out.tolist())
    return received, counts_in


def plain_moe(x, slot, weight, expert, ranks, slots):
    """Every route sent by itself; sums in the order and precision that the protocol states."""
    token, choice = (slot >= 0).nonzero(as_tuple=True)
    order = torch.argsort(slot[token, choice], stable=True)
    token, choice = token[order], choice[order]
    to_slot = slot[token, choice]
    counts = torch.bincount(to_slot // slots, minlength=ranks)
    rows, counts_in = exchange(x[token], counts)
    local = exchange((to_slot % slots)[:, None].contiguous(), counts)[0][:, 0]
    by_slot = torch.argsort(local, stable=True)
    rows = rows[by_slot]
    y = torch.empty_like(rows)
    y[:] = expert(rows, local[by_slot])
    back = torch.empty_like(y)
    back[by_slot] = y
    home = x.new_empty(len(token), x.shape[1])
    dist.all_to_all_single(home, back, counts.tolist(), counts_in.tolist())
    by_route = torch.zeros(*slot.shape, x.shape[1])
    by_route[token, choice] = home.float() * weight[token, choice][:, None]
    total = torch.zeros(len(x), x.shape[1])
    for rank in range(ranks):
        partial = torch.zeros_like(total)
        for k in range(slot.shape[1]):
            here = (slot[:, k] >= 0) & (slot[:, k] // slots == rank)
            partial[here] = partial[here] + by_route[here, k]
        total = total + partial.to(x.dtype).float()
    return rows, total.to(x.dtype)


def scaled_by_slot(rows, slot):
    return rows * (slot + 1).to(rows.dtype)[:, None]


def _equals_all_to_all(rank, ranks):
    for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        shape = {"tokens": 9 + 3 * rank, "hidden": 40, "slots": 3, "topk": 4}
        x, slot, weight = inputs_of(rank, ranks, dtype=dtype, seed=seed, **shape)
        kernels = dispatcher_of(3)
        for _ in range(2):  # the second pass reuses the heap
            dispatched = kernels.dispatch(x, slot, weight)
            y = scaled_by_slot(dispatched.rows_RD, dispatched.slot_R)
            out = kernels.combine(y, dispatched)
        rows, expected = plain_moe(x, slot, weight, scaled_by_slot, ranks, 3)
        assert torch.equal(dispatched.rows_RD, rows)
        assert torch.equal(out, expected)
        kernels.close()


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_kernels_equal_all_to_all_single_bit_for_bit(ranks):
    run_ranks(_equals_all_to_all, ranks)


def _fixed_rows(rank, ranks):
    shape = {"tokens": 9, "hidden": 40, "slots": 3, "topk": 4, "dtype": torch.float32, "seed": 5}
    x, slot, weight = inputs_of(rank, ranks, **shape)
    results = []
    for options in ({}, {"max_tokens": 16, "max_rows": 100}):
        dispatcher = dispatcher_of(3, **options)
        dispatched = dispatcher.dispatch(x, slot, weight)
        used = int(dispatched.tokens_per_slot_S.sum())
        out = dispatcher.combine(torch.tanh(dispatched.rows_RD), dispatched)
        results.append((dispatched.rows_RD[:used], dispatched.weight_R[:used], out))
    assert len(dispatched.rows_RD) == 100
    assert dispatcher.stats.rows_dispatch.sum() == 0, "counting would wait for the device"
    for exact, fixed in zip(*results, strict=True):
        assert torch.equal(exact, fixed)


def test_a_fixed_number_of_rows_gives_the_same_results():
    run_ranks(_fixed_rows, 2)


def _fixed_rows_overlap(rank, ranks):
    shape = {"tokens": 9, "hidden": 40, "slots": 3, "topk": 2, "dtype": torch.float32, "seed": 5}
    inputs = inputs_of(rank, ranks, **shape)
    dispatcher = dispatcher_of(3, max_tokens=16, max_rows=100)
    assert dispatcher.dispatch_local_first(*inputs, overlap="auto").travelling is None
    with pytest.raises(BackendError, match=r"on, max_rows = 100"):
        dispatcher.dispatch_local_first(*inputs, overlap="on")


def test_a_fixed_number_of_rows_is_handed_over_at_once_or_refused():
    run_ranks(_fixed_rows_overlap, 1)


def split_inputs(rank):
    """Half of each token's routes to each of two ranks with two slots."""
    draw = torch.Generator().manual_seed(rank)
    x = torch.randn(12, 24, generator=draw)
    slot = torch.randint(2, (12, 2), generator=draw) + torch.tensor([0, 2])
    return x, slot, torch.rand(12, 2, generator=draw)


def own_first_pass(dispatcher, dispatched):
    y = torch.tanh(dispatched.rows_RD)
    others = dispatched.travelling.wait()
    return dispatcher.combine(y, dispatched, torch.tanh(others.rows_RD))


def _own_rows_need_no_peer(rank, ranks, directory):
    """Would time out if rank 0 waited for a flag: rank 1 begins once rank 0 has its own rows."""
    store = dist.FileStore(f"{directory}/steps", ranks)
    inputs = split_inputs(rank)
    dispatcher = dispatcher_of(2, max_tokens=16, timeout_s=60)
    plain = dispatcher.dispatch(*inputs)
    expected = dispatcher.combine(torch.tanh(plain.rows_RD), plain)
    if rank == 1:
        store.wait(["rank 0 has its own rows"], datetime.timedelta(seconds=60))
    dispatched = dispatcher.dispatch_local_first(*inputs, overlap="on")
    x, slot, weight = inputs
    order = torch.argsort(slot[:, rank], stable=True)
    assert torch.equal(dispatched.rows_RD, x[order])
    assert torch.equal(dispatched.weight_R, weight[order, rank])
    if rank == 0:
        store.set("rank 0 has its own rows", "")
    assert torch.equal(own_first_pass(dispatcher, dispatched), expected)


def test_own_rows_are_handed_over_before_any_peer_has_begun(tmp_path):
    run_ranks(_own_rows_need_no_peer, 2, str(tmp_path))


def _next_dispatch_takes_rows_in(rank, ranks):
    dispatcher = dispatcher_of(2)
    inputs = split_inputs(rank)
    leaf = inputs[0].clone().requires_grad_()
    plain = dispatcher.dispatch(*inputs)
    expected = dispatcher.combine(torch.tanh(plain.rows_RD), plain)
    first = dispatcher.dispatch_local_first(leaf, *inputs[1:], overlap="on")
    with torch.no_grad():
        second = dispatcher.dispatch_local_first(*inputs, overlap="on")
    out = own_first_pass(dispatcher, first)
    assert torch.equal(out, expected)
    with pytest.raises(BackendError, match="rows of an earlier dispatch were waited for"):
        out.sum().backward()
    assert torch.equal(own_first_pass(dispatcher, second), expected)
    out = own_first_pass(
        dispatcher, dispatcher.dispatch_local_first(leaf, *inputs[1:], overlap="on")
    )
    out.sum().backward()
    slope = 1 - torch.tanh(inputs[0]) ** 2
    torch.testing.assert_close(leaf.grad, slope * inputs[2].sum(dim=1, keepdim=True))


def test_rows_that_nobody_waited_for_are_taken_in_by_the_next_dispatch():
    run_ranks(_next_dispatch_takes_rows_in, 2)


def _auto_overlap(rank, ranks):
    rates = DeviceRates(flops=2e12, bytes_per_second=1e12, element_bytes=4)
    assert rates.rows_per_expert == 4
    dispatcher = dispatcher_of(2, max_tokens=16)
    x, slot, weight = split_inputs(rank)
    cases = {
        "enough of both": (slot, True),
        "too few": (slot.where(torch.arange(12)[:, None] < 7, -1), False),
        "own alone": (torch.tensor([[0, 1]]).expand(12, 2) + 2 * rank, False),
    }
    with mock.patch("semantic_ep.runtime.overlap.device_rates", return_value=rates):
        for name, (routes, splits) in cases.items():
            dispatched = dispatcher.dispatch_local_first(x, routes, weight, overlap="auto")
            assert (dispatched.travelling is not None) == splits, name


def test_auto_splits_where_both_parts_have_enough_rows():
    run_ranks(_auto_overlap, 2)


def _others_need_a_living_peer(rank, ranks):
    inputs = split_inputs(rank)
    dispatcher = dispatcher_of(2, max_tokens=16, timeout_s=1.5)
    first = dispatcher.dispatch(*inputs)
    dispatcher.combine(first.rows_RD, first)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dispatched = dispatcher.dispatch_local_first(*inputs, overlap="on")
    assert len(dispatched.rows_RD) == 12
    with pytest.raises(PeerFailureError, match="rank 1 did not answer within"):
        dispatched.travelling.wait()


def test_a_peer_killed_before_its_rows_arrive_is_an_error_of_the_wait():
    run_ranks(_others_need_a_living_peer, 2, dying=[1])


def _quantised_rows(rank, ranks):
    dispatcher = dispatcher_of(4, max_tokens=8)
    x, slot, weight = inputs_of(
        rank, ranks, tokens=6, hidden=256, slots=4, topk=2, dtype=torch.float32, seed=2
    )
    exchange = dispatcher.dispatch(x, slot, weight).state.exchange
    scales = torch.rand(6, 1)  # fits the heap's rows, which have none: one process, own rows
    rows, row_scales, row_weight, per_slot, *_ = torch.ops.semantic_ep.dispatch(
        x.to(torch.float8_e4m3fn), scales, slot.int(), weight, exchange.key, -1
    )
    token, choice = (slot >= 0).nonzero(as_tuple=True)
    order = torch.argsort(slot[token, choice], stable=True)
    assert int(per_slot.sum()) == len(token)
    expected = x.to(torch.float8_e4m3fn)[token[order]]
    assert torch.equal(rows.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(row_scales, scales[token[order]])
    assert torch.equal(row_weight, weight[token, choice][order])


def test_fp8_rows_travel_with_their_scales():
    run_ranks(_quantised_rows, 1)


def _sees_a_killed_peer(rank, ranks, seed):
    x, slot, weight = inputs_of(
        rank, ranks, tokens=12, hidden=32, slots=2, topk=2, dtype=torch.float32, seed=seed
    )
    dispatcher = dispatcher_of(2, max_tokens=16, timeout_s=1.5)
    dispatcher.combine((first := dispatcher.dispatch(x, slot, weight)).rows_RD, first)
    if rank == 1:
        delay = random.Random(seed).uniform(0, 0.2)
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    started = time.monotonic()

    def exchange_for_a_minute():
        while time.monotonic() - started < 60:
            dispatched = dispatcher.dispatch(x, slot, weight)
            dispatcher.combine(dispatched.rows_RD, dispatched)

    with pytest.raises(PeerFailureError, match=r"did not answer within|reported a failure"):
        exchange_for_a_minute()
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("seed", range(3))
def test_a_process_killed_at_any_moment_does_not_hang_the_others(seed):
    run_ranks(_sees_a_killed_peer, 3, seed, dying=[1])


def _gradient_is_the_derivative(rank, ranks):
    """Central differences along random directions in all ranks' inputs at once, in float64."""
    x, slot, weight = inputs_of(
        rank, ranks, tokens=4 + rank, hidden=5, slots=2, topk=3, dtype=torch.float64, seed=7
    )
    weight = weight.double()
    dispatcher = dispatcher_of(2)
    probe = torch.randn(x.shape, dtype=torch.float64)

    def loss(x, weight):
        dispatched = dispatcher.dispatch(x, slot, weight)
        y = torch.sin(dispatched.rows_RD) * (dispatched.slot_R + 1)[:, None]
        return (dispatcher.combine(y, dispatched) * probe).sum()

    x.requires_grad_()
    weight.requires_grad_()
    loss(x, weight).backward()
    step = 1e-6
    for _ in range(4):
        along_x, along_weight = torch.randn_like(x), torch.randn_like(weight)
        with torch.no_grad():
            ahead = loss(x + step * along_x, weight + step * along_weight)
            behind = loss(x - step * along_x, weight - step * along_weight)
        slope = (ahead - behind) / (2 * step)
        expected = (x.grad * along_x).sum() + (weight.grad * along_weight).sum()
        both = torch.stack([slope, expected])
        dist.all_reduce(both)
        assert torch.allclose(both[0], both[1], rtol=1e-7, atol=1e-7)


def test_gradients_across_ranks_are_the_derivative():
    run_ranks(_gradient_is_the_derivative, 3)


def _shuffles_agree(rank, ranks):
    draw = torch.Generator().manual_seed(3)
    for tokens, dtype in ((13, torch.bfloat16), (24, torch.float32), (2, torch.float64)):
        schedule = torch.randperm(tokens, generator=draw) % ranks
        permutation = permutation_of(schedule, ranks)
        mine = torch.Generator().manual_seed(rank)
        x = torch.randn(tokens, 10, generator=mine, dtype=torch.float64).to(dtype)
        probe = torch.randn(tokens, 10, generator=mine, dtype=torch.float64).to(dtype)
        results = []
        for shuffle in (TorchShuffle(dist.group.WORLD), KernelShuffle(dist.group.WORLD)):
            leaf = x.clone().requires_grad_()
            part = shuffle.reduce_scatter(leaf, permutation)
            whole = shuffle.all_gather(part * 2, permutation, tokens)
            (whole * probe).sum().backward()
            results.append((part.detach(), whole.detach(), leaf.grad))
        for by_torch, by_kernels in zip(*results, strict=True):
            assert torch.equal(by_torch, by_kernels)
        summed = x.clone().double()
        dist.all_reduce(summed)
        assert torch.allclose(results[0][1].double(), 2 * summed, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("ranks", [2, 4])
def test_kernel_shuffles_equal_the_torch_ones_bit_for_bit(ranks):
    run_ranks(_shuffles_agree, ranks)


def _refuses_more_tokens_than_agreed(rank, ranks):
    x, slot, weight = inputs_of(
        rank, ranks, tokens=9, hidden=8, slots=2, topk=2, dtype=torch.float32, seed=0
    )
    with pytest.raises(BackendError, match="max_tokens = 8"):
        dispatcher_of(2, max_tokens=8).dispatch(x, slot, weight)


def test_more_tokens_than_the_buffers_hold_are_refused():
    run_ranks(_refuses_more_tokens_than_agreed, 2)


def _operators_keep_their_contract(rank, ranks):
    dispatcher = dispatcher_of(4, max_tokens=8)
    x, slot, weight = inputs_of(
        rank, ranks, tokens=5, hidden=3, slots=4, topk=2, dtype=torch.float64, seed=1
    )
    weight = weight.double()
    dispatched = dispatcher.dispatch(x, slot, weight)
    key, routes = dispatched.state.exchange.key, dispatched.state.routes
    ops = torch.ops.semantic_ep
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        ops.dispatch.default, (x, None, routes.slot_TK, weight, key, 12), test_utils=checks
    )
    torch.library.opcheck(
        ops.combine.default,
        (dispatched.rows_RD, dispatched.weight_R, *routes, key),
        test_utils=checks,
    )

    def through(x, weight):
        again = dispatcher.dispatch(x, slot, weight)
        return dispatcher.combine(torch.tanh(again.rows_RD), again)

    assert torch.autograd.gradcheck(
        through, (x.clone().requires_grad_(), weight.clone().requires_grad_())
    )


def test_operators_pass_opcheck_and_gradcheck():
    run_ranks(_operators_keep_their_contract, 1)
