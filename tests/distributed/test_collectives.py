"""What ranks tell each other, the loss of a peer, and the end of a rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("torch")

from semantic_ep.errors import PeerFailureError
from semantic_ep.runtime.collectives import from_all_ranks
from tests.distributed.launcher import run_ranks

# Gloo's threads hold the last references to these tensors. An attribute gives a tensor a Python
# object that is worth keeping, which takes the GIL to let go.
_IN_FLIGHT = """
import sys
import torch
import torch.distributed as dist
from semantic_ep.runtime.collectives import leave

dist.init_process_group("gloo")
for _ in range(40):
    tensor = torch.ones(100_000)
    tensor.attribute = object()
    work = dist.all_reduce(tensor, async_op=True)
    del tensor, work
print("done")
leave(0)
"""

_THREAD = """
import atexit, sys, threading, time
from semantic_ep.runtime.collectives import leave

atexit.register(print, "handler", end="")
threading.Thread(target=lambda: (time.sleep({seconds}), print("thread", end=" "))).start()
print("main", end=" ")
leave({code})
"""


def told(rank, ranks):
    import torch.distributed as dist

    pairs = [dist.new_group([0, 2]), dist.new_group([1])]
    everyone = from_all_ranks({"rank": rank}, "telling")
    return everyone, from_all_ranks(f"r{rank}", "telling", pairs[rank % 2])


def left_alone(rank, ranks):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerFailureError, match="sharing of plans failed on rank 0 of 2") as caught:
        from_all_ranks(rank, "sharing of plans")
    return str(caught.value)


def test_ranks_get_what_each_passed_in_the_order_of_the_group():
    results = run_ranks(told, 3)
    everyone = [{"rank": rank} for rank in range(3)]
    assert results == [(everyone, group) for group in (["r0", "r2"], ["r1"], ["r0", "r2"])]


def test_a_lost_peer_is_named_as_such():
    message, _ = run_ranks(left_alone, 2, dying=[1])
    assert "another rank of the group died" in message


def run(*command, **more):
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=60, **more
    )


def test_work_that_gloo_has_not_let_go_of_does_not_end_a_rank_by_a_signal(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(_IN_FLIGHT)
    done = run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", script),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 4


@pytest.mark.parametrize(
    ("code", "seconds", "output"), [(0, 0.5, "main thread handler"), (3, 600, "main handler")]
)
def test_leaving_runs_handlers_and_waits_for_threads_of_ranks_that_did_their_work(
    code, seconds, output
):
    done = run("-c", _THREAD.format(code=code, seconds=seconds))
    assert (done.returncode, done.stdout) == (code, output), done.stderr
