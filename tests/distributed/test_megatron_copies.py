"""Experts with several copies train in Megatron-core as if each had one."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from semantic_ep.errors import ConfigError, PlacementError
from tests.distributed import megatron_tiny as tiny
from tests.distributed.launcher import run_ranks
from tests.distributed.megatron_tiny import Trainer

pytestmark = pytest.mark.distributed

# 8 experts on 2 ranks with 2 spare slots each, and on 4 ranks with 1; expert 6 has 3 copies there.
ON_TWO = np.array([[3, 1, 6, 0, 4, 7, 2, 4, 5, 3, 1, 0], [0, 1, 2, 3, 6, 7, 4, 5, 6, 7, 2, 0]])
ON_FOUR = np.array([[6, 1, 3, 0, 6, 2, 5, 4, 6, 7, 3, 1], [7, 0, 6, 1, 2, 6, 5, 3, 4, 4, 6, 5]])
# Twelve steps under a plan with copies, then six each under others.
STEPS = 24


def with_copies(config, rows, **build):
    """A trainer whose experts have the copies of `rows`, with what a run brings for them."""
    from semantic_ep.integrations.megatron.dispatcher import Exchange
    from semantic_ep.integrations.megatron.gradients import FinalizeWithCopies

    exchange = Exchange("torch", num_layers=len(rows))
    return Trainer.build(config, rows, exchange=exchange, finalize=FinalizeWithCopies(), **build)


def copies_of(trainer, rows):
    """(layer, expert) -> weights and whole optimizer states of each copy, from all ranks."""
    own = {}
    for number, layer in enumerate(trainer.model.module.decoder.layers):
        group = layer.mlp.ep_group
        held = rows[number].reshape(group.size(), -1)[group.rank()]
        for expert, module in zip(held.tolist(), layer.mlp.experts.local_experts, strict=True):
            for parameter in module.parameters():
                values = [parameter, *states_of(trainer.optimizer, parameter)]
                own.setdefault((number, expert), []).extend(v.detach().tolist() for v in values)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    found = {}
    for of_rank in everyone:
        for where, values in of_rank.items():
            found.setdefault(where, []).append(values)
    return found


def states_of(optimizer, parameter):
    for each in optimizer.chained_optimizers:
        state = each.optimizer.state.get(getattr(parameter, "main_param", parameter), {})
        yield from (state[name] for name in ("exp_avg", "exp_avg_sq") if name in state)


def assert_copies_are_alike(trainer, rows):
    found = copies_of(trainer, rows)
    assert len(found) == rows.shape[0] * tiny.EXPERTS
    for where, copies in found.items():
        assert all(copy == copies[0] for copy in copies), where


@dataclasses.dataclass(frozen=True)
class Case:
    ranks: int
    rows: np.ndarray
    expert_parallel: int
    divided: bool = False
    overlap: bool = False
    micro_batches: int = 1


def losses_of(trainer, case, rank, steps):
    return [
        loss
        for step in steps
        for loss in trainer.step(
            [tiny.batch((step + 2 * micro) % 4, rank) for micro in range(case.micro_batches)]
        )
    ]


def _runs(rank, ranks, directory, case):
    tiny.start(expert_parallel=case.expert_parallel)
    build = {
        "distributed_optimizer": case.divided,
        "clip_grad": 0.3,
        "log_num_zeros_in_grad": True,
        "buffers": {"overlap_grad_reduce": case.overlap},
    }
    contiguous = Trainer.build(tiny.config(), **build)
    losses_of(contiguous, case, rank, range(2))
    contiguous.save(directory / "start")
    del contiguous.measured[:]
    straight = losses_of(contiguous, case, rank, range(STEPS))

    copied = with_copies(tiny.config(), case.rows, **build)
    assert_copies_are_alike(copied, case.rows)
    copied.load(directory / "start")
    losses = losses_of(copied, case, rank, range(STEPS))
    assert_copies_are_alike(copied, case.rows)
    measured = [contiguous.measured, copied.measured]
    copied.save(directory / "copied")

    straight += losses_of(contiguous, case, rank, range(STEPS, STEPS + 6))
    back = Trainer.build(tiny.config(), **build)
    back.load(directory / "copied")
    losses += losses_of(back, case, rank, range(STEPS, STEPS + 6))
    other = with_copies(tiny.config(), case.rows[::-1], **build)
    other.load(directory / "copied")
    again = losses_of(other, case, rank, range(STEPS, STEPS + 6))
    assert_copies_are_alike(other, case.rows[::-1])
    return straight, losses, again, measured


@pytest.mark.parametrize(
    "case",
    [
        Case(2, ON_TWO, 2),
        Case(2, ON_TWO, 2, divided=True, micro_batches=2),
        Case(4, ON_FOUR, 4),
        Case(4, ON_TWO, 2, divided=True, overlap=True),
    ],
    ids=["2", "2-divided", "4", "4-in-2-groups-divided"],
)
def test_copies_train_alike_with_the_losses_and_norms_of_single_experts(tmp_path, case):
    for straight, losses, again, measured in run_ranks(
        _runs, case.ranks, tmp_path, case, timeout=500
    ):
        assert straight[STEPS - 1] < straight[0] - 0.1
        np.testing.assert_allclose(losses, straight, atol=1e-4)
        np.testing.assert_allclose(again, losses[-len(again) :], atol=1e-4)
        (norms, zeros), (norms_copied, zeros_copied) = (np.transpose(m[:STEPS]) for m in measured)
        assert norms.min() > 0.3
        np.testing.assert_allclose(norms_copied, norms, rtol=1e-3)
        np.testing.assert_array_equal(zeros_copied, zeros)
