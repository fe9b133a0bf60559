"""Ranks end with the exit code of their work, whatever threads still do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")

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
