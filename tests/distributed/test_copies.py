"""Gradients of the copies of an expert add up to the same bits wherever they are added."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from semantic_ep.plan.placement import Placement
from semantic_ep.runtime.copies import CopyGradient, CopySums
from semantic_ep.runtime.exchange import fill_copies
from tests.distributed.launcher import run_ranks

pytestmark = pytest.mark.distributed

# In layer 0 expert 0 is on three ranks; in layer 1 experts 5 and 1 are on two.
PLACEMENT = Placement(
    physical_to_logical_map=np.array([[0, 1, 2, 0, 3, 4, 0, 5], [5, 1, 2, 5, 3, 4, 0, 1]]),
    num_experts=6,
    ep_size=4,
)
SIZES = {"fc1": 1000, "bias": 7}
KINDS = {"fc1": torch.float32, "bias": torch.bfloat16}


def gradient(layer, slot, name):
    draw = torch.Generator().manual_seed(100 * layer + 10 * slot + len(name))
    return torch.randn(SIZES[name], generator=draw).mul(10.0 ** (slot - 4)).to(KINDS[name])


def expected(layer, expert, name):
    """The sum in the order of the slots, rounded once."""
    slots = np.flatnonzero(PLACEMENT.physical_to_logical_map[layer] == expert).tolist()
    return sum(gradient(layer, slot, name).float() for slot in slots).to(KINDS[name])


def pieces_of(rank, owners, share):
    """Pieces of a rank; `owners` ranks divide each slot's gradients, of which this is `share`."""
    held = []
    for layer in range(2):
        for slot in (2 * rank, 2 * rank + 1):
            expert = int(PLACEMENT.physical_to_logical_map[layer, slot])
            if PLACEMENT.logical_count[layer, expert] == 1:
                continue
            for name in SIZES:
                values = gradient(layer, slot, name)
                # Other bounds for each slot, as in buffers that hold other experts before it.
                cuts = [0, *([len(values) * (slot + 1) // 10] if owners == 2 else []), len(values)]
                start, end = cuts[share], cuts[share + 1]
                held.append(
                    CopyGradient(
                        layer=layer,
                        name=name,
                        expert=expert,
                        slot=slot,
                        values=values[start:end],
                        start=start,
                    )
                )
    return held


def _sum(rank, ranks, owners):
    pieces = pieces_of(rank % 4, owners, rank // 4)
    sums = CopySums(pieces, dist.group.WORLD)
    for times in (1, 2):
        if times == 2:
            for piece, fresh in zip(pieces, pieces_of(rank % 4, owners, rank // 4), strict=True):
                piece.values.copy_(fresh.values)
        sums.sum()
        for piece in pieces:
            want = expected(piece.layer, piece.expert, piece.name)
            assert torch.equal(piece.values, want[piece.start :][: len(piece.values)]), piece
    return len(pieces)


@pytest.mark.parametrize(("ranks", "owners"), [(4, 1), (8, 2)])
def test_every_copy_gets_the_sum_in_the_order_of_slots_bit_by_bit(ranks, owners):
    pieces = run_ranks(_sum, ranks, owners)
    copies = 2 * (3 + 2 + 2)  # Tensors of experts 0, then 5 and 1.
    assert sum(pieces) == copies * owners


def _fill(rank, ranks):
    for layer in range(2):
        held = PLACEMENT.experts_of_rank(layer, rank)
        rows = {name: [gradient(layer, 2 * rank + s, name) for s in (0, 1)] for name in SIZES}
        fill_copies(rows, placement=PLACEMENT, layer=layer, group=dist.group.WORLD)
        for slot, expert in enumerate(held.tolist()):
            first = int(PLACEMENT.logical_to_physical_map[layer, expert, 0])
            for name in SIZES:
                assert torch.equal(rows[name][slot], gradient(layer, first, name))


def test_all_copies_start_as_the_first():
    run_ranks(_fill, 4)
