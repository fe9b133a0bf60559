import ctypes
import fcntl
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from semantic_ep.errors import BackendError
from semantic_ep.runtime import symm
from tests.distributed.launcher import run_ranks


def mapped_blocks():
    """Lines of this process's memory map; a block without a name is marked."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in maps if "/semantic_ep-" in line]


def _all_ranks_see_each_other(rank, ranks):
    memory = symm.allocate(dist.group.WORLD, 4096, torch.device("cpu"))
    memory.barrier()
    assert len(mapped_blocks()) == ranks
    assert all(line.endswith("(deleted)") for line in mapped_blocks())
    assert memory.rank == rank
    assert memory.num_bytes == 4096
    for owner, pointer in enumerate(memory.pointers):
        cell = ctypes.c_int64.from_address(pointer + 8 * rank)
        assert cell.value == 0
        cell.value = 100 * owner + rank
    memory.barrier()
    own = (ctypes.c_int64 * ranks).from_address(memory.pointers[rank])
    assert list(own) == [100 * rank + peer for peer in range(ranks)]
    del own, cell
    memory.close()
    assert memory.pointers == []
    assert mapped_blocks() == []


@pytest.mark.distributed
def test_every_rank_addresses_every_block():
    run_ranks(_all_ranks_see_each_other, 3)


@pytest.fixture
def shm_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(symm, "_SHM_DIRECTORY", tmp_path)
    return tmp_path


def old_block(directory, name):
    path = directory / name
    path.write_bytes(b"x")
    long_ago = time.time() - 3600
    os.utime(path, (long_ago, long_ago))
    return path


def test_blocks_of_dead_processes_are_removed(shm_directory):
    path = old_block(shm_directory, "semantic_ep-dead")
    assert symm.remove_stale_blocks() == ["semantic_ep-dead"]
    assert not path.exists()


def test_blocks_of_living_processes_and_of_others_stay(shm_directory):
    locked = old_block(shm_directory, "semantic_ep-alive")
    foreign = old_block(shm_directory, "psm_other")
    young = shm_directory / "semantic_ep-young"
    young.write_bytes(b"x")
    with open(locked, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert symm.remove_stale_blocks() == []
    assert locked.exists()
    assert foreign.exists()
    assert young.exists()


def _has_no_room(rank, ranks):
    before = set(Path("/dev/shm").iterdir())
    with pytest.raises(BackendError, match="no room for"):
        symm.PosixSharedMemory(dist.group.WORLD, 1 << 50)
    left = set(Path("/dev/shm").glob("semantic_ep-*")) - before
    assert all(_locked_by_another(path) for path in left)


def _locked_by_another(path):
    """Blocks of groups that run beside this test are theirs."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return True
    return False


@pytest.mark.distributed
def test_a_full_shared_memory_is_an_error_not_a_bus_error():
    run_ranks(_has_no_room, 1)


def test_virtual_ranks_share_one_process():
    views = symm.LocalMemory.create(3, 64, torch.device("cpu"))
    assert [view.rank for view in views] == [0, 1, 2]
    assert views[0].pointers == views[2].pointers
    assert len(set(views[0].pointers)) == 3
