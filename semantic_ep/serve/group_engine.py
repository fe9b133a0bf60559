"""The engine as rank 0's front uses it: requests in from any thread, events out."""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from semantic_ep.errors import SemanticEPError, UnavailableError, explain
from semantic_ep.serve.lockstep import Action, Control, Report, run_lockstep
from semantic_ep.serve.plans import ServingPlans
from semantic_ep.serve.protocol import (
    EngineRequest,
    RecordAction,
    RecordedPhase,
    RequestScheduler,
    TokenEvent,
)
from semantic_ep.serve.recording import record
from semantic_ep.serve.reload import read_plan, schedules_by_table, take_over
from semantic_ep.serve.requests import check_request
from semantic_ep.serve.stats import EngineStats, RankLoad, RankStats
from semantic_ep.serve.worker import RankWorker

logger = logging.getLogger(__name__)

OnEvent = Callable[[TokenEvent], object]
_HEARTBEAT_SECONDS = 0.5


@dataclasses.dataclass(kw_only=True)
class _Ticket:
    """A request that has not ended."""

    request: EngineRequest
    on_event: OnEvent
    assigned: bool = False
    new_tokens: int = 0


class GroupEngine:
    """See `semantic_ep.serve.protocol.Engine`; the other ranks call `run_lockstep`.

    Args:
        worker: Of rank 0.
        group: See `run_lockstep`.
        scheduler: Which rank serves a request; in attention-TP, when a request starts: it is
            for the one rank that speaks for all.
        max_sequence_tokens: Longest prompt plus output, of the model and of the KV cache.
        on_failure: Called once, from the engine's thread, when the loop fails. The process should
            end then, with an error: the group cannot be repaired.
    """

    def __init__(
        self,
        worker: RankWorker,
        group: ProcessGroup,
        *,
        scheduler: RequestScheduler,
        max_sequence_tokens: int,
        on_failure: Callable[[BaseException], object] | None = None,
    ) -> None:
        self._worker = worker
        self._scheduler = scheduler
        self._max_sequence_tokens = max_sequence_tokens
        self._on_failure = on_failure
        self._changed = threading.Condition()
        # Guarded by the condition:
        self._tickets: dict[str, _Ticket] = {}
        self._submitted: list[str] = []
        self._cancelled: list[str] = []
        self._actions: list[tuple[Action, Future[Any]]] = []
        self._drained: list[Future[None]] = []
        self._draining = self._closing = self._ended = False
        self._error: BaseException | None = None
        # The loop's own:
        self._handed_over: tuple[tuple[int, EngineRequest], ...] = ()
        self._acting: Future[Any] | None = None
        empty = RankStats(load=worker.load())
        self._stats = EngineStats(
            ranks=(empty,) * group.size(),
            physical_to_logical_map=worker.model.placement.physical_to_logical_map,
        )
        self._by_table = schedules_by_table(worker)
        self._homes = 1 if worker.has_all_requests else group.size()
        self._thread = threading.Thread(
            target=self._run, args=(group,), name="semantic-ep-engine", daemon=True
        )
        self._thread.start()

    @property
    def max_sequence_tokens(self) -> int:
        """See `Engine`."""
        return self._max_sequence_tokens

    @property
    def healthy(self) -> bool:
        """See `Engine`."""
        return not self._ended

    @property
    def failure(self) -> str | None:
        """See `Engine`."""
        return None if self._error is None else f"{type(self._error).__name__}: {self._error}"

    def raise_failure(self) -> None:
        """Raise what the loop failed with, if it did."""
        if self._error is not None:
            raise self._error

    def submit(self, request: EngineRequest, on_event: OnEvent) -> None:
        """See `Engine`."""
        check_request(request, max_sequence_tokens=self._max_sequence_tokens)
        with self._changed:
            if self._draining or self._closing or self._ended:
                state = self.failure or ("closed" if self._ended else "draining")
                raise UnavailableError(explain("the engine takes no requests", got=state))
            if request.id in self._tickets:
                raise UnavailableError(
                    explain("a request of this id is being served", where="id", got=request.id)
                )
            self._tickets[request.id] = _Ticket(request=request, on_event=on_event)
            self._submitted.append(request.id)
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        """See `Engine`."""
        with self._changed:
            self._cancelled.append(request_id)
            self._changed.notify()

    def stats(self) -> EngineStats:
        """See `Engine`."""
        return self._stats

    def reload_plan(self, plan: Path, decode_plan: Path | None = None) -> Future[Mapping[str, Any]]:
        """See `Engine`."""
        future = _future()
        try:
            # Read once, here: a rank that cannot would leave the others waiting.
            fingerprint = self._worker.model.fingerprint
            plans = ServingPlans(
                plan=read_plan(plan, fingerprint),
                decode=None if decode_plan is None else read_plan(decode_plan, fingerprint),
            )
        except SemanticEPError as error:
            future.set_exception(error)
            return future
        # Called in the loop's thread, between two steps.
        future.add_done_callback(functools.partial(self._taken_over, plans))
        action = functools.partial(
            take_over,
            placement=plans.plan.placement,
            decode_placement=plans.decode_placement,
            schedule=plans.schedule if self._by_table else None,
            decode_schedule=plans.decode_schedule if self._by_table else None,
        )
        return self._enqueue(action, future)

    def record(
        self, action: RecordAction, output: Path | None = None, *, phase: RecordedPhase = "all"
    ) -> Future[Mapping[str, Any]]:
        """See `Engine`."""
        command = functools.partial(record, action=action, output=output, phase=phase)
        return self._enqueue(command, _future())

    def drain(self) -> Future[None]:
        """See `Engine`."""
        future = _future()
        with self._changed:
            self._draining = True
            if self._ended or not self._tickets:
                future.set_result(None)
            else:
                self._drained.append(future)
        return future

    def close(self) -> None:
        """See `Engine`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    # Called by the loop.

    def control(self, *, working: bool) -> Control:
        """See `Front`."""
        with self._changed:
            if not (working or self._pending()):
                self._changed.wait(_HEARTBEAT_SECONDS)
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, []
            closing = self._closing
            action, self._acting = self._actions.pop(0) if self._actions else (None, None)
            new = [self._tickets[request_id].request for request_id in submitted]
        now = time.monotonic()
        for request in new:
            self._scheduler.add(request, now=now)
        on_ranks = []
        for request_id in cancelled:
            if self._scheduler.remove(request_id):
                self._emit(TokenEvent(request_id=request_id, finish_reason="cancelled"))
            else:
                on_ranks.append(request_id)
        self._handed_over = () if closing else self._assign(now)
        return Control(
            assigned=self._handed_over,
            cancelled=tuple(on_ranks),
            action=action,
            close=closing,
        )

    def deliver(self, reports: list[Report]) -> None:
        """See `Front`."""
        ranks = tuple(
            dataclasses.replace(report.stats or known, load=report.load)
            for report, known in zip(reports, self._stats.ranks, strict=True)
        )
        self._stats = dataclasses.replace(self._stats, ranks=ranks, queued=len(self._scheduler))
        for report in reports:
            for event in report.events:
                self._emit(event)

    def acted(self, outcome: Any) -> None:
        """See `Front`."""
        future, self._acting = self._acting, None
        assert future is not None
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def stepped(self, seconds: float) -> None:
        """See `Front`."""
        self._stats = dataclasses.replace(
            self._stats,
            steps=self._stats.steps + 1,
            step_seconds=self._stats.step_seconds + seconds,
        )

    def _run(self, group: ProcessGroup) -> None:
        error: BaseException | None = None
        try:
            run_lockstep(self._worker, group, self)
        except BaseException as caught:  # Whatever it was, those who wait must hear of it.
            error = caught
            logger.exception("the serving loop failed")
        self._end(error)
        if error is not None and self._on_failure is not None:
            self._on_failure(error)

    def _end(self, error: BaseException | None) -> None:
        with self._changed:
            self._ended = True
            self._error = error
            left = list(self._tickets)
            futures = [future for _, future in self._actions]
            if self._acting is not None:
                futures.append(self._acting)
        for request_id in left:
            self._emit(
                TokenEvent(
                    request_id=request_id,
                    finish_reason="cancelled" if error is None else "error",
                    error=self.failure,
                )
            )
        for future in futures:
            future.set_exception(error or UnavailableError(explain("the engine was closed")))

    def _enqueue(self, action: Action, future: Future[Any]) -> Future[Any]:
        with self._changed:
            if not self._ended:
                self._actions.append((action, future))
                self._changed.notify()
                return future
        future.set_exception(UnavailableError(explain("the engine has ended")))
        return future

    def _taken_over(self, plans: ServingPlans, future: Future[Any]) -> None:
        if future.exception() is not None:
            return
        if self._homes > 1:
            self._scheduler.replan(plans.schedule, plans.decode_schedule)
        # What slots have computed so far was for the experts that were there before.
        ranks = tuple(dataclasses.replace(r, slot_rows_LS=None) for r in self._stats.ranks)
        self._stats = dataclasses.replace(
            self._stats,
            ranks=ranks,
            plan_reloads=self._stats.plan_reloads + 1,
            physical_to_logical_map=self._worker.model.placement.physical_to_logical_map,
        )

    def _pending(self) -> bool:
        return bool(
            self._submitted
            or self._cancelled
            or self._actions
            or self._closing
            or len(self._scheduler)
        )

    def _assign(self, now: float) -> tuple[tuple[int, EngineRequest], ...]:
        """Ask the scheduler, with what the ranks' last reports do not know yet counted in."""
        loads = [rank.load for rank in self._stats.ranks[: self._homes]]
        for rank, request in self._handed_over:
            loads[rank] = _with_request(loads[rank], request)
        assigned = []
        for assignment in self._scheduler.assign(loads, now=now):
            ticket = self._tickets[assignment.request_id]
            ticket.assigned = True
            assigned.append((assignment.rank, ticket.request))
        return tuple(assigned)

    def _emit(self, event: TokenEvent) -> None:
        with self._changed:
            ticket = self._tickets.get(event.request_id)
            if ticket is None:
                return
            ticket.new_tokens += len(event.token_ids)
            drained: list[Future[None]] = []
            if event.finish_reason is not None:
                del self._tickets[event.request_id]
                if not self._tickets:
                    drained, self._drained = self._drained, []
        if event.finish_reason is not None and ticket.assigned:
            self._scheduler.finished(event.request_id, new_tokens=ticket.new_tokens)
        try:
            ticket.on_event(event)
        except Exception:  # A listener's mistake must not stop everybody's requests.
            logger.exception("the listener of request %s failed", event.request_id)
        for future in drained:
            future.set_result(None)


def _with_request(load: RankLoad, request: EngineRequest) -> RankLoad:
    return dataclasses.replace(
        load,
        waiting=load.waiting + 1,
        pending_tokens=load.pending_tokens + len(request.prompt_token_ids),
    )


def _future() -> Future[Any]:
    """A future that the one who waits cannot cancel: the group may be at it already."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future
