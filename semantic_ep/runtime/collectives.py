"""Collectives that name the failure of a peer instead of a socket error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from semantic_ep.errors import PeerFailureError, explain

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
