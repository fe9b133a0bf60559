from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from semantic_ep.errors import PlacementError
from semantic_ep.plan.placement import Placement
from semantic_ep.runtime.exchange import exchange_experts, expert_moves
from tests.distributed.launcher import run_ranks

pytestmark = pytest.mark.distributed

LAYERS, EXPERTS = 2, 8


def drawn(seed, ep_size, slots, empty=False):
    """A placement with replicas in the slots that are left, or with empty slots."""
    draw = np.random.default_rng(seed)
    table = np.full((LAYERS, ep_size, slots), -1, dtype=np.int32)
    for layer in range(LAYERS):
        even = draw.permutation(EXPERTS).reshape(ep_size, -1)
        for rank in range(ep_size):
            spare = np.setdiff1d(np.arange(EXPERTS), even[rank])
            more = draw.choice(spare, slots - len(even[rank]), replace=False)
            held = [*even[rank], *(np.full_like(more, -1) if empty else more)]
            table[layer, rank] = draw.permutation(held)
    return Placement(
        physical_to_logical_map=table.reshape(LAYERS, -1), num_experts=EXPERTS, ep_size=ep_size
    )


@given(st.integers(0, 1000), st.sampled_from([1, 2, 4]), st.booleans())
def test_moves_carried_out_one_by_one_make_the_new_placement(seed, ranks, empty):
    slots = EXPERTS // ranks + (ranks > 1)
    old, new = drawn(seed, ranks, slots, empty), drawn(seed + 1, ranks, slots)
    table = old.physical_to_logical_map.copy()
    for move in expert_moves(old, new):
        source = move.source_rank * slots + move.source_slot
        assert old.physical_to_logical_map[move.layer, source] == move.expert
        table[move.layer, move.target_rank * slots + move.target_slot] = move.expert
    assert np.array_equal(table, new.physical_to_logical_map)
    assert expert_moves(new, new) == []


def test_placements_of_different_shape_are_refused():
    with pytest.raises(
        PlacementError, match=r"slots a rank\) \(2, 8, 2, 5\).*Allowed: \(2, 8, 2, 4\)"
    ):
        expert_moves(drawn(0, 2, 4), drawn(0, 2, 5))


def contents(placement, rank):
    """Tensors of several dtypes whose rows say which expert they are."""
    layers = []
    for layer in range(LAYERS):
        held = torch.from_numpy(placement.experts_of_rank(layer, rank).astype(np.int64))
        key = (held + 10 * layer).double()
        weight = torch.sin(key[:, None, None] * torch.arange(1, 13).view(3, 4))
        layers.append(
            {
                "weight": weight.bfloat16(),
                "exp_avg": weight.float().square(),
                "bias": torch.arange(3, dtype=torch.uint8) + held[:, None].to(torch.uint8),
            }
        )
    return layers


def _exchange(rank, ranks):
    slots = EXPERTS // ranks + 1
    for seed in range(4):
        old, new = drawn(seed, ranks, slots, empty=seed == 0), drawn(seed + 50, ranks, slots)
        tensors, expected = contents(old, rank), contents(new, rank)
        done = exchange_experts(tensors, old=old, new=new, group=dist.group.WORLD)
        for mine, want in zip(tensors, expected, strict=True):
            assert all(torch.equal(mine[name], want[name]) for name in want)
        moves = expert_moves(old, new)
        away = sum(move.source_rank != move.target_rank for move in moves)
        assert done.experts_moved == len(moves)
        assert done.bytes_moved == away * (12 * 2 + 12 * 4 + 3)
        back = exchange_experts(tensors, old=new, new=new, group=dist.group.WORLD)
        assert back.bytes_moved == 0
        assert back.sha256 == done.sha256


def test_every_tensor_of_an_expert_arrives_unchanged():
    run_ranks(_exchange, 4)


def _layers_apart(rank, ranks):
    """Two groups of two ranks with a layer each, and then with all layers each."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    old, new = drawn(1, 2, 5), drawn(2, 2, 5)
    here = rank // 2
    tensors, expected = [contents(p, rank % 2)[here : here + 1] for p in (old, new)]
    apart = exchange_experts(
        tensors, old=old, new=new, group=pairs[here], together=dist.group.WORLD, layers=[here]
    )
    assert all(torch.equal(tensors[0][name], want) for name, want in expected[0].items())
    return apart, exchange_experts(contents(old, rank % 2), old=old, new=new, group=pairs[here])


def test_groups_with_other_layers_report_what_one_with_all_of_them_would():
    results = run_ranks(_layers_apart, 4)
    assert all(apart == whole == results[0][0] for apart, whole in results)
    assert results[0][0].bytes_moved > 0


@contextmanager
def one_bit_lost(*, here):
    """One bit of what this rank receives of experts, if it is `here`."""
    from semantic_ep.runtime import exchange

    receive = exchange._receive_layer

    def damage(*call):
        arrived = receive(*call)
        if here and arrived:
            next(iter(next(iter(arrived.values())).values())).view(torch.uint8)[0, 0] ^= 1
        return arrived

    with mock.patch.object(exchange, "_receive_layer", damage):
        yield


def _damaged(rank, ranks):
    slots = EXPERTS // ranks + 1
    old, new = drawn(1, ranks, slots), drawn(2, ranks, slots)
    tensors = contents(old, rank)
    copies = old.logical_count[1]
    slot = old.experts_of_rank(1, rank).tolist().index(int(np.argmax(copies)))
    if rank == int(old.logical_to_physical_map[1, np.argmax(copies), 0]) // slots:
        tensors[1]["weight"][slot, 0, 0] += 1
    before = [{name: tensor.clone() for name, tensor in layer.items()} for layer in tensors]
    with pytest.raises(PlacementError, match="differ before the exchange"):
        exchange_experts(tensors, old=old, new=new, group=dist.group.WORLD)
    for mine, was in zip(tensors, before, strict=True):
        assert all(torch.equal(mine[name], was[name]) for name in was)


def test_copies_that_differ_are_found_and_nothing_changes_on_any_rank():
    run_ranks(_damaged, 2)


def _damaged_on_the_way(rank, ranks):
    """Two groups of two ranks; one byte changes on its way to rank 3."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    old, new = drawn(1, 2, 5), drawn(2, 2, 5)
    tensors, before = contents(old, rank % 2), contents(old, rank % 2)
    # Rows may also be tensors of their own.
    apart = [{name: list(tensor.unbind(0)) for name, tensor in layer.items()} for layer in tensors]
    lost = one_bit_lost(here=rank == 3)
    with lost, pytest.raises(PlacementError, match="differ after the exchange"):
        exchange_experts(apart, old=old, new=new, group=pairs[rank // 2], together=dist.group.WORLD)
    for mine, was in zip(tensors, before, strict=True):
        assert all(torch.equal(mine[name], was[name]) for name in was)


def test_a_byte_damaged_on_its_way_to_one_group_changes_nothing_in_any_group():
    run_ranks(_damaged_on_the_way, 4)
