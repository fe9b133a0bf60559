import contextlib
import dataclasses
import datetime
import os
import signal
import time
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.errors import BackendError, PeerFailureError
from semantic_ep.integrations.expert_parallel import SemanticExperts, StepContext
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.cost import evaluate
from semantic_ep.plan.placement import Placement
from semantic_ep.runtime import backends
from semantic_ep.runtime.backends import create_dispatcher
from semantic_ep.runtime.slots import remap, slot_tables
from tests.distributed.launcher import run_ranks

pytestmark = pytest.mark.distributed


@dataclasses.dataclass(frozen=True)
class Case:
    tokens: tuple[int, ...]
    hidden: int = 8
    slots: int = 3
    top_k: int = 2
    dropped: float = 0.0
    hot_rank: int | None = None
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def inputs(self, rank, ranks):
        draw = torch.Generator().manual_seed(1000 * self.seed + rank)
        tokens = self.tokens[rank]
        x = torch.randn(tokens, self.hidden, generator=draw, dtype=torch.float64)
        scores = torch.rand(tokens, ranks * self.slots, generator=draw)
        if self.hot_rank is not None:
            scores[:, self.hot_rank * self.slots : (self.hot_rank + 1) * self.slots] += 1
        slot = scores.topk(self.top_k, dim=1).indices
        slot[torch.rand(slot.shape, generator=draw) < self.dropped] = -1
        weight = torch.rand(tokens, self.top_k, generator=draw, dtype=torch.float64)
        return x.to(self.dtype), slot, weight.to(self.dtype)


CASES = {
    2: [
        Case(tokens=(5, 7)),
        Case(tokens=(0, 4), seed=1),
        Case(tokens=(0, 0)),
        Case(tokens=(6, 3), dropped=0.4, seed=2),
        Case(tokens=(4, 4), dropped=1.0),
        Case(tokens=(9, 2), hot_rank=1, top_k=3, seed=3),
        Case(tokens=(1, 1), hidden=1, slots=1, top_k=1),
        Case(tokens=(6, 6), hidden=5, dtype=torch.bfloat16, seed=4),
        Case(tokens=(6, 6), hidden=7, dtype=torch.float16, seed=5),
        Case(tokens=(60, 20), hidden=33, dtype=torch.float32, dropped=0.1, seed=6),
    ],
    4: [
        Case(tokens=(5, 0, 7, 2), slots=4, top_k=4),
        Case(tokens=(30, 31, 32, 0), slots=2, top_k=8, dropped=0.2, seed=1),
        Case(tokens=(3, 3, 3, 3), hot_rank=2, slots=4, top_k=3, seed=2),
    ],
}


def expert_matrix(global_slot, hidden, dtype):
    draw = torch.Generator().manual_seed(global_slot)
    return torch.randn(hidden, hidden, generator=draw, dtype=torch.float64).to(dtype)


def run_experts(rows, tokens_per_slot, rank, slots):
    blocks = rows.split(tokens_per_slot.tolist())
    return torch.cat(
        [
            block @ expert_matrix(rank * slots + local, rows.shape[1], rows.dtype)
            for local, block in enumerate(blocks)
        ]
    )


def expected(x, slot, weight):
    """Every token through all its experts in one process, in the summing order of float64."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for token, choice in (slot >= 0).nonzero().tolist():
        matrix = expert_matrix(int(slot[token, choice]), x.shape[1], x.dtype)
        row = (x[token : token + 1] @ matrix)[0].double()
        out[token] = out[token] + weight[token, choice].double() * row
    return out


def moe_pass(dispatcher, x, slot, weight, experts, **options):
    """Dispatch, `experts(rows)`, combine; rows that travel apart are waited for in between."""
    dispatched = dispatcher.dispatch(x, slot, weight, **options)
    y = experts(dispatched)
    if dispatched.travelling is None:
        return dispatcher.combine(y, dispatched)
    return dispatcher.combine(y, dispatched, experts(dispatched.travelling.wait()))


def _matches_one_process(rank, ranks, backend, overlap):
    for case in CASES[ranks]:
        x, slot, weight = case.inputs(rank, ranks)
        x.requires_grad_()
        weight.requires_grad_()
        dispatcher = create_dispatcher(backend, group=dist.group.WORLD, slots_per_rank=case.slots)

        def experts(rows, slots=case.slots):
            assert int(rows.tokens_per_slot_S.sum()) == len(rows.rows_RD)
            return run_experts(rows.rows_RD, rows.tokens_per_slot_S, rank, slots)

        out = moe_pass(dispatcher, x, slot, weight, experts, overlap=overlap)
        assert out.dtype == case.dtype
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(case.dtype, 0.1)
        want = expected(x, slot, weight)
        assert torch.allclose(out.double(), want, rtol=tolerance, atol=tolerance), case

        probe = torch.randn(x.shape, generator=torch.Generator().manual_seed(rank)).to(case.dtype)
        (out * probe).sum().backward()
        got = x.grad.clone(), weight.grad.clone()
        x.grad = weight.grad = None
        if want.requires_grad:  # not where this rank has no route at all
            (want * probe.double()).sum().backward()
        for mine, reference in zip(got, (x.grad, weight.grad)):
            reference = torch.zeros_like(mine) if reference is None else reference
            assert torch.allclose(mine, reference, rtol=tolerance, atol=2 * tolerance), case


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("backend", "overlap"),
    [
        ("torch", "off"),
        ("torch", "on"),
        ("reference", "off"),
        ("kernels-emulated", "off"),
        ("kernels-emulated", "on"),
    ],
)
def test_outputs_and_gradients_equal_one_process_for_every_shape(backend, overlap, ranks):
    run_ranks(_matches_one_process, ranks, backend, overlap)


LOCAL_FIRST = ["torch", "kernels-emulated"]


def _overlap_changes_no_bit(rank, ranks, backend):
    for case in CASES[ranks]:
        x, slot, weight = case.inputs(rank, ranks)
        x.requires_grad_()
        # By element: a matrix product may round a row differently beside other rows.
        scale = torch.arange(1, case.slots + 1, dtype=case.dtype) * (rank + 1)
        outputs, counters, gradients = [], [], []
        # The ranks need not decide alike.
        for overlap in ("off", "on", "on" if rank % 2 else "off"):
            dispatcher = create_dispatcher(
                backend, group=dist.group.WORLD, slots_per_rank=case.slots
            )
            split = dispatcher.dispatch(x, slot, weight, overlap=overlap).travelling
            assert (split is not None) == (overlap == "on")
            if split is not None:
                split.wait()
            outputs.append(
                moe_pass(
                    dispatcher,
                    x,
                    slot,
                    weight,
                    lambda rows, scale=scale: torch.tanh(rows.rows_RD * scale[rows.slot_R, None]),
                    overlap=overlap,
                )
            )
            counters.append(dispatcher.stats.snapshot())
            outputs[-1].double().square().sum().backward()
            gradients.append(x.grad)
            x.grad = None
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-4}.get(case.dtype, 0.1)
        for gradient in gradients[1:]:  # added up in another order
            torch.testing.assert_close(gradient, gradients[0], rtol=tolerance, atol=tolerance)
        assert torch.equal(outputs[0], outputs[1]), case
        assert torch.equal(outputs[0], outputs[2]), case
        for name, counted in counters[0].items():
            assert all(np.array_equal(counted, other[name]) for other in counters[1:]), (case, name)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("backend", LOCAL_FIRST)
def test_own_rows_first_changes_neither_a_bit_of_the_output_nor_a_counter(backend, ranks):
    run_ranks(_overlap_changes_no_bit, ranks, backend)


def _overlapped_layer(rank, ranks, backend):
    config = Qwen3MoeConfig(hidden_size=16, moe_intermediate_size=24, num_experts=3)
    torch.manual_seed(rank)
    local = Qwen3MoeExperts(config)
    for parameter in local.parameters():
        torch.nn.init.normal_(parameter)
    draw = torch.Generator().manual_seed(rank)
    tokens = 40 - 40 * (rank == 1)  # one rank has none
    x = torch.randn(tokens, 16, generator=draw)
    index = torch.rand(tokens, 6, generator=draw).topk(2, dim=1).indices
    results = []
    for overlap in ("off", "on"):
        experts = SemanticExperts(
            local,
            dispatcher=create_dispatcher(backend, group=dist.group.WORLD, slots_per_rank=3),
            layer=0,
            slot_table_E=torch.tensor([3, 1, 5, 0, 4, 2]),
            hidden_size=16,
            top_k=2,
            context=StepContext(torch.device("cpu"), overlap=overlap),
        )
        local.zero_grad()
        out = experts(x, index, torch.full((tokens, 2), 0.5))
        out.sum().backward()
        results.append([out, *(parameter.grad.clone() for parameter in local.parameters())])
    for plain, overlapped in zip(*results, strict=True):
        assert torch.allclose(plain, overlapped, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", LOCAL_FIRST)
def test_a_layer_computes_and_learns_the_same_with_own_rows_first(backend):
    run_ranks(_overlapped_layer, 2, backend)


def _computes_while_rows_travel(rank, ranks, directory):
    """Would hang if rank 0 waited for rows before `wait`, or sent its own only inside of it."""
    store = dist.FileStore(f"{directory}/steps", ranks)
    patience = datetime.timedelta(seconds=60)
    draw = torch.Generator().manual_seed(rank)
    x = torch.randn(2048, 1024, generator=draw)  # more than sockets buffer
    slot = torch.tensor([[0, 1]]).repeat(2048, 1)  # a row to each rank
    plain_send = dist.all_to_all_single

    def late_send(*args, **options):
        if options.get("async_op"):
            store.wait(["rank 0 has computed its own rows"], patience)
        return plain_send(*args, **options)

    dispatcher = create_dispatcher("torch", group=dist.group.WORLD, slots_per_rank=1)
    late = mock.patch.object(dist, "all_to_all_single", late_send)
    with late if rank == 1 else contextlib.nullcontext():
        dispatched = dispatcher.dispatch(x, slot, torch.ones(2048, 2), overlap="on")
    y = torch.tanh(dispatched.rows_RD)
    if rank == 0:
        store.set("rank 0 has computed its own rows", "")
        started = time.monotonic()
        while not store.check(["rank 1 has all rows"]):
            y = torch.tanh(dispatched.rows_RD)
            assert time.monotonic() - started < 60
    travelled = dispatched.travelling.wait()
    if rank == 1:
        store.set("rank 1 has all rows", "")
    out = dispatcher.combine(y, dispatched, torch.tanh(travelled.rows_RD))
    assert torch.equal(out, 2 * torch.tanh(x))


def test_gloo_moves_rows_while_a_rank_computes_its_own(tmp_path):
    run_ranks(_computes_while_rows_travel, 2, str(tmp_path))


def _overlap_refused(rank, ranks):
    dispatcher = create_dispatcher("reference", group=dist.group.WORLD, slots_per_rank=2)
    inputs = torch.ones(3, 4), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2)
    assert dispatcher.dispatch(*inputs, overlap="auto").travelling is None
    with pytest.raises(BackendError, match="'reference' cannot hand over own rows first"):
        dispatcher.dispatch(*inputs, overlap="on")


def test_a_backend_that_cannot_overlap_says_so_where_it_is_demanded():
    run_ranks(_overlap_refused, 1)


def _backends_agree_and_repeat(rank, ranks):
    case = CASES[ranks][-1]
    x, slot, weight = case.inputs(rank, ranks)
    outputs, orders = [], []
    for backend in ("torch", "torch", "reference", "kernels-emulated"):
        dispatcher = create_dispatcher(backend, group=dist.group.WORLD, slots_per_rank=case.slots)
        dispatched = dispatcher.dispatch(x, slot, weight)
        orders.append(dispatched.rows_RD)
        outputs.append(dispatcher.combine(dispatched.rows_RD, dispatched))
    assert torch.equal(outputs[0], outputs[1])
    for order, output in zip(orders[2:], outputs[2:], strict=True):
        assert torch.equal(orders[0], order)
        assert torch.allclose(outputs[0], output, rtol=1e-12, atol=1e-12)


def test_row_order_is_the_contract_and_results_repeat_bit_for_bit():
    run_ranks(_backends_agree_and_repeat, 4)


def random_trace(*, tokens, layers, experts, top_k, seed=0):
    draw = np.random.default_rng(seed)
    routes = draw.random((tokens, layers, experts)).argsort(axis=2)[:, :, :top_k]
    return RoutingTrace(
        fingerprint=ModelFingerprint(
            architecture="test",
            layer_ids=tuple(range(layers)),
            num_experts=experts,
            top_k=top_k,
        ),
        experts=routes.astype(np.uint8),
        offsets=np.array([0, tokens]),
        token_id=np.zeros(tokens, dtype=np.int32),
    )


def replicated_placement(*, layers, experts, ranks, seed=0):
    """Two spare slots a rank, filled with experts that the rank does not hold yet."""
    draw = np.random.default_rng(seed)
    own = experts // ranks
    table = np.empty((layers, ranks, own + 2), dtype=np.int32)
    for layer in range(layers):
        table[layer, :, :own] = draw.permutation(experts).reshape(ranks, own)
        for rank in range(ranks):
            others = np.setdiff1d(np.arange(experts), table[layer, rank, :own])
            table[layer, rank, own:] = draw.choice(others, 2, replace=False)
    return Placement(
        physical_to_logical_map=table.reshape(layers, -1), num_experts=experts, ep_size=ranks
    )


def _counters(rank, ranks, trace, placement, home, hidden):
    tables = torch.from_numpy(slot_tables(placement, rank=rank))
    dispatcher = create_dispatcher(
        "torch",
        group=dist.group.WORLD,
        slots_per_rank=placement.slots_per_rank,
        num_layers=placement.num_layers,
    )
    mine = torch.from_numpy(trace.experts[home == rank].astype(np.int64))
    for layer in range(placement.num_layers):
        slot = remap(tables[layer], mine[:, layer])
        x = torch.ones(len(mine), hidden, dtype=torch.bfloat16)
        dispatched = dispatcher.dispatch(x, slot, torch.ones(slot.shape), layer=layer)
        dispatcher.combine(dispatched.rows_RD, dispatched)
    return dispatcher.stats


@pytest.mark.parametrize("replicas", [False, True])
def test_bytes_on_the_wire_equal_the_cost_model_exactly(replicas):
    layers, experts, ranks, hidden = 3, 16, 4, 20
    trace = random_trace(tokens=203, layers=layers, experts=experts, top_k=4)
    home = np.random.default_rng(1).integers(0, ranks, trace.num_tokens)
    placement = (
        replicated_placement(layers=layers, experts=experts, ranks=ranks)
        if replicas
        else Placement.contiguous(num_layers=layers, num_experts=experts, ep_size=ranks)
    )
    stats = run_ranks(_counters, ranks, trace, placement, home, hidden)
    cost = evaluate(placement, trace, home)

    rows = np.stack([s.rows_dispatch for s in stats], axis=1)
    assert np.array_equal(rows, cost.rows_between_ranks)
    wire = np.stack([s.bytes_dispatch.sum(axis=0) for s in stats])
    np.fill_diagonal(wire, 0)
    assert np.array_equal(wire, cost.bytes_between_ranks(2 * hidden))
    back = np.stack([s.bytes_combine.sum(axis=0) for s in stats])
    np.fill_diagonal(back, 0)
    assert np.array_equal(back, wire.T)

    tokens = np.stack([s.tokens for s in stats])
    assert np.array_equal(tokens.sum(axis=0), [trace.num_tokens] * layers)
    local = sum(s.activations[:, rank] for rank, s in enumerate(stats))
    assert np.allclose(local / (trace.num_tokens * 4), cost.lar)
    sent = rows.sum(axis=(1, 2)) - np.trace(rows, axis1=1, axis2=2)
    assert np.allclose(sent / trace.num_tokens, cost.remote_copies)
    computed = np.stack([s.slot_activations.sum(axis=1) for s in stats], axis=1)
    assert np.array_equal(computed, sum(s.activations for s in stats))


class _Operators(TorchDispatchMode):
    """Notes every operator of torch, and bytes by destination of every exchange."""

    def __init__(self):
        super().__init__()
        self.names, self.sent = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        if func.namespace == "c10d":
            message, splits = args[1], args[4] or [1] * dist.get_world_size()
            bytes_a_row = message.nbytes // max(1, len(message))
            self.sent.append([rows * bytes_a_row for rows in splits])
        return func(*args, **(kwargs or {}))


def _what_a_pass_does(rank, ranks, tokens, overlap):
    case = Case(tokens=(tokens,) * ranks, slots=16 // ranks, top_k=4, dtype=torch.float32)
    x, slot, weight = case.inputs(rank, ranks)
    dispatcher = create_dispatcher("torch", group=dist.group.WORLD, slots_per_rank=case.slots)
    # Once before: the ranks agree on the backend.
    moe_pass(dispatcher, x, slot, weight, lambda rows: rows.rows_RD)
    dispatcher.stats.reset()
    with _Operators() as operators:
        moe_pass(dispatcher, x, slot, weight, lambda rows: rows.rows_RD, overlap=overlap)
    stats = dispatcher.stats
    counted = (stats.bytes_dispatch + stats.bytes_metadata + stats.bytes_combine)[0]
    away = np.arange(ranks) != rank
    assert np.array_equal(np.sum(operators.sent, axis=0)[away], counted[away])
    # Nothing but the hidden states of these rows goes home.
    assert np.array_equal(np.array(operators.sent[-1])[away], stats.bytes_combine[0][away])
    return operators.names


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_a_pass_is_three_exchanges_and_as_many_operators_for_any_tokens_and_ranks(overlap):
    passes = [
        names
        for ranks, tokens in ((2, 5), (2, 300), (4, 40))
        for names in run_ranks(_what_a_pass_does, ranks, tokens, overlap)
    ]
    for names in passes:
        assert [name for name in names if name.startswith("c10d.")] == [
            "c10d.alltoall_base_.default"
        ] * 3  # sizes, rows, results
        assert names == passes[0]


def test_metadata_is_counted_apart():
    trace = random_trace(tokens=8, layers=1, experts=4, top_k=2)
    placement = Placement.contiguous(num_layers=1, num_experts=4, ep_size=2)
    home = np.arange(8) % 2
    for stats in run_ranks(_counters, 2, trace, placement, home, 16):
        # A row of 32 bytes, then 2 weights of 4 bytes and 2 slots of 4, each on 16 bytes.
        assert np.array_equal(stats.bytes_dispatch, stats.rows_dispatch * 32)
        assert np.array_equal(stats.bytes_metadata, 8 + stats.rows_dispatch * 32)


def _masked(rank, ranks):
    dispatcher = create_dispatcher("torch", group=dist.group.WORLD, slots_per_rank=2)
    mask = torch.tensor([True, False, True])
    slot = remap(torch.arange(4), torch.tensor([[0, 3], [1, 2], [2, 1]]), mask)
    dispatched = dispatcher.dispatch(torch.ones(3, 4), slot, torch.ones(3, 2))
    out = dispatcher.combine(dispatched.rows_RD, dispatched)
    assert out[:, 0].tolist() == [2.0, 0.0, 2.0]
    return int(dispatcher.stats.tokens[0]), int(dispatcher.stats.activations.sum())


def test_padding_tokens_are_neither_sent_nor_counted():
    assert run_ranks(_masked, 2) == [(2, 4), (2, 4)]


class _FailsOnRank1:
    """Stands for a backend that one rank cannot set up."""

    name = "fragile"

    def is_available(self):
        return True, "present"

    def supports(self, call):
        return True, "anything"

    def create(self, *, group, slots_per_rank, stats, max_tokens):
        if group.rank() == 1:
            raise BackendError("no symmetric memory here")
        return object()


def _agree(rank, ranks):
    registry = {"fragile": _FailsOnRank1(), "torch": backends.BACKENDS["torch"]}
    x, slot, weight = torch.ones(2, 4), torch.tensor([[0], [1]]), torch.ones(2, 1)
    with mock.patch.object(backends, "BACKENDS", registry):
        named, auto = (
            create_dispatcher(name, group=dist.group.WORLD, slots_per_rank=1)
            for name in ("fragile", "auto")
        )
    with pytest.raises(BackendError, match="fragile: rank 1: no symmetric memory here"):
        named.dispatch(x, slot, weight)
    dispatched = auto.dispatch(x, slot, weight)
    assert torch.equal(auto.combine(dispatched.rows_RD, dispatched), x)


def test_a_backend_that_one_rank_cannot_set_up_is_passed_over_on_all_ranks():
    run_ranks(_agree, 2)


def _bad_inputs(rank, ranks):
    dispatcher = create_dispatcher("torch", group=dist.group.WORLD, slots_per_rank=2)
    good = torch.ones(3, 4), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2)
    for position, bad, match in (
        (1, torch.full((3, 2), 4), "leave the range -1..1"),
        (1, torch.zeros(2, 2, dtype=torch.long), r"\[T, K\]"),
        (0, torch.ones(3, 4, dtype=torch.long), "floating point"),
        (1, torch.zeros(3, 2), "slots must be integers"),
    ):
        arguments = list(good)
        arguments[position] = bad
        with pytest.raises(BackendError, match=match):
            dispatcher.dispatch(*arguments)
    with pytest.raises(BackendError, match="there is no such dispatch backend"):
        create_dispatcher("deepep2", group=dist.group.WORLD, slots_per_rank=2)


def test_impossible_inputs_are_refused_before_anything_is_sent():
    run_ranks(_bad_inputs, 1)


def _survive(rank, ranks, how):
    dispatcher = create_dispatcher("torch", group=dist.group.WORLD, slots_per_rank=2)
    x, slot, weight = torch.ones(4, 8), torch.tensor([[0, 2]] * 4), torch.ones(4, 2)
    dispatcher.combine((d := dispatcher.dispatch(x, slot, weight)).rows_RD, d)
    if rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)
    start = time.monotonic()
    with pytest.raises(PeerFailureError, match=f"failed on rank {rank} of {ranks}"):
        dispatcher.combine((d := dispatcher.dispatch(x, slot, weight)).rows_RD, d)
    return time.monotonic() - start


def test_a_killed_rank_is_an_error_for_the_others_at_once():
    waited = run_ranks(_survive, 3, "killed", dying=[1])
    assert waited[0] < 10
    assert waited[2] < 10


def _dies_while_its_rows_are_awaited(rank, ranks):
    def die(*args, **options):
        if options.get("async_op"):
            os.kill(os.getpid(), signal.SIGKILL)
        return plain_send(*args, **options)

    plain_send = dist.all_to_all_single
    dispatcher = create_dispatcher("torch", group=dist.group.WORLD, slots_per_rank=2)
    inputs = torch.ones(4, 8), torch.tensor([[0, 2]] * 4), torch.ones(4, 2)
    fatal = mock.patch.object(dist, "all_to_all_single", die)
    with fatal if rank == 1 else contextlib.nullcontext():
        dispatched = dispatcher.dispatch(*inputs, overlap="on")
    assert len(dispatched.rows_RD) == 4, "own rows need no peer"
    started = time.monotonic()
    with pytest.raises(PeerFailureError, match="all-to-all of dispatch failed on rank 0 of 2"):
        dispatched.travelling.wait()
    assert time.monotonic() - started < 30


def test_a_rank_killed_before_its_rows_arrive_is_an_error_of_the_wait():
    run_ranks(_dies_while_its_rows_are_awaited, 2, dying=[1])
