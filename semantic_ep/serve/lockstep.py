"""The loop that every rank of a serving group runs: agree, step, report.

Before each step the ranks exchange one small message: rank 0 says what is new (requests and their
ranks, cancellations, a plan to take over), and every rank what its last step brought. All ranks
draw the same conclusion from it: if anyone has tokens, all step, those without tokens included.
With nothing to do the exchange goes on as a heartbeat, so that a lost rank is noticed when idle
too.
"""

from __future__ import annotations

import dataclasses
import pickle
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from semantic_ep.errors import PeerFailureError, SemanticEPError
from semantic_ep.runtime.collectives import peer_guard
from semantic_ep.serve.protocol import EngineRequest, TokenEvent
from semantic_ep.serve.rank_stats import rank_stats
from semantic_ep.serve.stats import RankLoad, RankStats
from semantic_ep.serve.worker import RankWorker

# Bytes that a message of ordinary size fits into; longer ones take a second collective.
_FRAME = 4096
_STATS_EVERY_SECONDS = 0.5

Action = Callable[[RankWorker, ProcessGroup], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Control:
    """What rank 0 has decided.

    Attributes:
        assigned: (rank, request).
        cancelled: Request ids.
        action: Run on every rank between two steps, with the rank's worker and the group; it
            pickles. While ranks still communicate in it, all raise alike or none.
        close: Whether to end the loop.
    """

    assigned: tuple[tuple[int, EngineRequest], ...] = ()
    cancelled: tuple[str, ...] = ()
    action: Action | None = None
    close: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What one rank's last step brought.

    Attributes:
        busy: Whether it has sequences to go on with.
        load: See there.
        events: In order.
        stats: Counters, now and then.
    """

    busy: bool
    load: RankLoad
    events: tuple[TokenEvent, ...] = ()
    stats: RankStats | None = None


class Front(Protocol):
    """Rank 0's side of the loop."""

    def control(self, *, working: bool) -> Control:
        """Decide; may wait for requests if no rank was working in the last turn."""
        ...

    def deliver(self, reports: list[Report]) -> None:
        """Take the reports of all ranks."""
        ...

    def acted(self, outcome: Any) -> None:
        """Take what the action returned on rank 0, or the error that it raised."""
        ...

    def stepped(self, seconds: float) -> None:
        """A step with tokens has ended."""
        ...


def run_lockstep(worker: RankWorker, group: ProcessGroup, front: Front | None = None) -> None:
    """Serve until rank 0 says to close; every rank of the group calls this together.

    Args:
        worker: Of this rank.
        group: The EP group's ranks, on a backend for host memory (gloo).
        front: On rank 0.

    Raises:
        PeerFailureError: Another rank died, or did not answer within the group's time-out.
    """
    assert (front is not None) == (group.rank() == 0)
    working, events, told = False, [], 0.0
    while True:
        control = front.control(working=working) if front is not None else None
        stats = None
        if time.monotonic() - told > _STATS_EVERY_SECONDS:
            stats, told = rank_stats(worker), time.monotonic()
        report = Report(
            busy=bool(worker.batcher),
            load=worker.load(),
            events=tuple(events),
            stats=stats,
        )
        messages = _exchange((control, report), group)
        control = messages[0][0]
        if front is not None:
            front.deliver([report for _, report in messages])
        if control.close:
            return
        events = _apply(control, worker, group.rank())
        if control.action is not None:
            outcome = _act(control.action, worker, group)
            if front is not None:
                front.acted(outcome)
        working = bool(control.assigned) or any(report.busy for _, report in messages)
        if working:
            start = time.perf_counter()
            events += worker.step()
            if front is not None:
                front.stepped(time.perf_counter() - start)


def _apply(control: Control, worker: RankWorker, rank: int) -> list[TokenEvent]:
    for target, request in control.assigned:
        if target == rank or worker.has_all_requests:
            worker.add(request)
    ended = [worker.cancel(request_id) for request_id in control.cancelled]
    return [event for event in ended if event is not None]


def _act(action: Action, worker: RankWorker, group: ProcessGroup) -> Any:
    try:
        return action(worker, group)
    except PeerFailureError:
        raise
    except (SemanticEPError, OSError) as error:
        return error


def _exchange(message: Any, group: ProcessGroup) -> list[Any]:
    """Messages of all ranks, by rank. Ranks trust each other: they are pickled."""
    if group.size() == 1:
        return [message]
    content = pickle.dumps(message)
    framed = len(content).to_bytes(8, "little") + content
    frames = _gathered(framed, _FRAME, group)
    sizes = [int.from_bytes(frame[:8], "little") for frame in frames]
    longest = max(sizes) + 8
    if longest > _FRAME:
        frames = _gathered(framed, longest, group)
    return [pickle.loads(frame[8 : 8 + size]) for frame, size in zip(frames, sizes, strict=True)]


def _gathered(content: bytes, size: int, group: ProcessGroup) -> list[bytes]:
    mine = torch.zeros(size, dtype=torch.uint8)
    head = content[:size]
    mine[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    everyone = torch.empty(group.size() * size, dtype=torch.uint8)
    with peer_guard("exchange of control messages", group):
        dist.all_gather_into_tensor(everyone, mine, group=group)
    return [part.numpy().tobytes() for part in everyone.chunk(group.size())]
