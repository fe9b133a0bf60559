"""Run a function on several gloo ranks inside one test.

Ranks are forked from a server that has the frameworks imported already, so that a launch costs a
fraction of a second after the first. A rank that raises, dies or hangs fails the test, with its
traceback, and takes the others down with it.
"""

from __future__ import annotations

import datetime
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any
from unittest import mock

_PRELOAD = [
    "torch.distributed",
    "transformers.models.auto.modeling_auto",
    "transformers.generation.utils",
    "deepspeed",
]
# Known to the server before it imports them: ranks run on the CPU, one thread each.
_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def run_ranks(
    target: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    collective_timeout: float = 60.0,
    dying: Collection[int] = (),
) -> list[Any]:
    """Call `target(rank, world_size, *args)` on every rank and return the results in rank order.

    Args:
        target: A module-level function (it is pickled by name). Its result must pickle.
        world_size: Number of ranks. The default process group is gloo over all of them.
        *args: Further arguments, pickled.
        timeout: Seconds after which every rank is killed and the test fails.
        collective_timeout: Seconds that a collective waits for a peer.
        dying: Ranks that are expected to be killed by a signal; their result is None. Any other
            rank that ends without a result is a failure.

    Raises:
        AssertionError: A rank raised (its traceback is in the message), died or hung.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with mock.patch.dict(os.environ, _ENVIRONMENT):
        multiprocessing.forkserver.ensure_running()
    with tempfile.TemporaryDirectory(prefix="semantic-ep-ranks-") as directory:
        store = str(Path(directory, "store"))
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            context.Process(
                target=_rank_main,
                args=(writer, target, rank, world_size, store, collective_timeout, args),
                daemon=True,
            )
            for rank, (_, writer) in enumerate(pipes)
        ]
        try:
            for process in ranks:
                process.start()
            for _, writer in pipes:
                writer.close()
            return _collect(ranks, [reader for reader, _ in pipes], timeout, dying)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(
    ranks: list[Any],
    readers: list[multiprocessing.connection.Connection],
    timeout: float,
    dying: Collection[int],
) -> list[Any]:
    results: list[Any] = [None] * len(ranks)
    failures: dict[int, str] = {}
    waiting = dict(zip(readers, range(len(ranks)), strict=True))
    deadline = time.monotonic() + timeout
    # After the first failure the others get a moment to report what they saw of it.
    while waiting and (left := deadline - time.monotonic()) > 0:
        for reader in multiprocessing.connection.wait(list(waiting), timeout=left):
            rank = waiting.pop(reader)
            try:
                ok, value = pickle.loads(reader.recv_bytes())
            except EOFError:
                ranks[rank].join(timeout=5)
                code = ranks[rank].exitcode
                if rank not in dying or code is None or code >= 0:
                    failures[rank] = f"ended without a result, exit code {code}"
            else:
                if ok:
                    results[rank] = value
                else:
                    failures[rank] = value
            if failures:
                deadline = min(deadline, time.monotonic() + 2.0)
    if waiting:
        hung = sorted(waiting.values())
        failures.update((rank, "no result; killed") for rank in hung)
        if len(failures) == len(hung):
            failures[hung[0]] = f"ranks {hung} gave no result within {timeout:.0f} s"
    if failures:
        report = "\n".join(f"--- rank {rank}: {failures[rank]}" for rank in sorted(failures))
        raise AssertionError(f"{len(failures)} of {len(ranks)} ranks failed\n{report}")
    return results


def _rank_main(
    writer: multiprocessing.connection.Connection,
    target: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    collective_timeout: float,
    args: tuple[Any, ...],
) -> None:
    # The terminal's interrupt is for the test process, which then kills its ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(LOCAL_SIZE=str(world_size))
    # A rank that ended while others still connect would fail them: a new group is whole first.
    os.environ.update(TORCH_DIST_INIT_BARRIER="1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=collective_timeout),
        )
        # Plain pickle: torch's own sends tensors as shared memory, which ends with this process.
        message = pickle.dumps((True, target(rank, world_size, *args)))
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    # Processes that a framework started, as for checkpoints, would outlive this one, which is
    # killed when its result is there.
    for child in multiprocessing.active_children():
        child.kill()
    try:
        writer.send_bytes(message)
    finally:
        writer.close()
        # Group destruction may wait for a dead peer; the process has nothing left to lose.
        os._exit(0)
