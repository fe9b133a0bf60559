"""Megatron runs go on, optimizer included, at another expert-parallel size."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from semantic_ep.errors import CheckpointError
from tests.distributed import megatron_tiny as tiny
from tests.distributed.launcher import run_ranks
from tests.distributed.test_megatron import ROWS
from tests.distributed.test_megatron_replanning import SMOOTH

pytestmark = pytest.mark.distributed


def losses_of(trainer, rank, steps):
    # Twice the ranks see the same data twice, and have the gradients of the two.
    return [trainer.step([tiny.batch(step % 2, rank % 2)])[0] for step in steps]


def _save(rank, ranks, directory):
    tiny.start()
    results = []
    for divided in (False, True):
        trainer = tiny.Trainer.build(tiny.config(), ROWS, distributed_optimizer=divided, **SMOOTH)
        losses_of(trainer, rank, range(6))
        trainer.save(directory / str(divided))
        results.append(losses_of(trainer, rank, range(6, 10)))
    return results


def _start_unspread(rank, ranks, directory):
    from semantic_ep.integrations.megatron import check_optimizer_fits

    tiny.start(expert_parallel=1)
    for divided in (False, True):
        trainer = tiny.Trainer.build(tiny.config(), distributed_optimizer=divided)
        with pytest.raises(CheckpointError, match="saved with experts spread, loaded with experts"):
            check_optimizer_fits(directory / str(divided), trainer.optimizer)


def _go_on(rank, ranks, directory, ep_size):
    from semantic_ep.integrations.megatron import check_optimizer_fits

    tiny.start(expert_parallel=ep_size)
    results = []
    for divided in (False, True):
        trainer = tiny.Trainer.build(
            tiny.config(), ROWS[::-1], distributed_optimizer=divided, **SMOOTH
        )
        check_optimizer_fits(directory / str(divided), trainer.optimizer)
        trainer.load(directory / str(divided))
        results.append(losses_of(trainer, rank, range(6, 10)))
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("megatron") / "saved"
    return directory, run_ranks(_save, 2, directory)


@pytest.mark.parametrize("ep_size", [4, 2])
def test_a_run_goes_on_with_more_ranks_and_experts_spread_otherwise(saved, ep_size):
    directory, expected = saved
    for rank, losses in enumerate(run_ranks(_go_on, 4, directory, ep_size)):
        np.testing.assert_allclose(losses, expected[rank % 2], atol=1e-5)


def test_optimizer_state_of_spread_experts_is_refused_where_they_are_not_spread(saved):
    run_ranks(_start_unspread, 1, saved[0])
