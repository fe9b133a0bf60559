"""Collectives that name the failure of a peer instead of a socket error, and the end of a rank."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn, TypeVar, cast

from semantic_ep.errors import PeerFailureError, explain

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


@contextmanager
def peer_guard(operation: str, group: ProcessGroup) -> Iterator[None]:
    """Turn the error of a collective inside the block into `PeerFailureError`.

    A dead gloo peer closes its connections and is noticed at once; a silent one after the time-out
    of the process group. NCCL reports through its watchdog, which ends the process by itself.
    """
    try:
        yield
    except RuntimeError as error:
        raise PeerFailureError(
            explain(
                f"{operation} failed on rank {group.rank()} of {group.size()}: another rank of the "
                "group died or stopped answering",
                got=str(error).split(". ")[0] or repr(error),
                do="Look for the first error among the other ranks' logs, then restart the group",
            )
        ) from error


def from_all_ranks(mine: T, operation: str, group: ProcessGroup | None = None) -> list[T]:
    """What every rank of a group passed, in their order; collective.

    Args:
        mine: Of this rank; pickles.
        operation: What fails when a peer is gone, for the message.
        group: All ranks of the job by default.

    Raises:
        PeerFailureError: Another rank died or did not answer in time.
    """
    import torch.distributed as dist

    ranks = dist.group.WORLD if group is None else group
    everyone: list[T | None] = [None] * ranks.size()
    with peer_guard(operation, ranks):
        dist.all_gather_object(everyone, mine, group=ranks)
    return cast("list[T]", everyone)


def leave(code: int) -> NoReturn:
    """End the process of a rank with an exit code, without finalizing its interpreter.

    A thread of gloo may let go of a tensor after the last collective has returned, and after
    `destroy_process_group` where a framework still holds the group. To do so it takes the GIL, and
    taking the GIL of an interpreter that is being finalized ends the process by SIGABRT
    (https://github.com/pytorch/pytorch/pull/179291): a run that did all its work would fail.

    Handlers of `atexit` run and streams are flushed. Threads are waited for, as at any exit, unless
    the rank failed: they may wait for a peer that is gone.
    """
    if code == 0:
        threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
