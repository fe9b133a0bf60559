import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.launcher import run_ranks

pytestmark = pytest.mark.distributed


def _sum_of_ranks(rank, world_size, offset):
    total = torch.tensor(rank + offset)
    dist.all_reduce(total)
    return int(total)


def _rank_one_raises(rank, world_size):
    if rank == 1:
        raise KeyError("the culprit")
    dist.barrier()


def _rank_one_dies(rank, world_size):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def _rank_one_hangs(rank, world_size):
    if rank == 1:
        time.sleep(600)


def test_results_come_back_in_rank_order_from_a_working_group():
    assert run_ranks(_sum_of_ranks, 2, 10) == [21, 21]


def test_the_traceback_of_a_raising_rank_is_in_the_failure():
    with pytest.raises(AssertionError, match="the culprit"):
        run_ranks(_rank_one_raises, 2)


def test_a_killed_rank_fails_the_test_unless_its_death_is_expected():
    with pytest.raises(AssertionError, match="rank 1: ended without a result, exit code -9"):
        run_ranks(_rank_one_dies, 2)
    assert run_ranks(_rank_one_dies, 2, dying=[1]) == ["alive", None]


def test_a_hanging_rank_is_killed_at_the_time_out():
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"ranks \[1\] gave no result within 3 s"):
        run_ranks(_rank_one_hangs, 2, timeout=3)
    assert time.monotonic() - start < 20
