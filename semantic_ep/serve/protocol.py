"""What the HTTP front, the request scheduler and the engine agree on; free of torch.

Rank 0 runs the front and the scheduler. The engine's loop runs on every rank, in lockstep; on
rank 0 it lives in a thread of its own, so that everything here may be called from any thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from semantic_ep.serve.stats import EngineStats, RankLoad

if TYPE_CHECKING:
    from semantic_ep.plan.schedule import Schedule

FinishReason = Literal["stop", "length", "cancelled", "error"]
RecordAction = Literal["start", "stop", "dump"]
# Tokens of prompts, or generated ones.
RecordedPhase = Literal["all", "prefill", "decode"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen, and when it ends.

    Attributes:
        max_tokens: New tokens at most, at least 1.
        temperature: Divides the logits; 0 is greedy.
        top_p: Smallest set of tokens with at least this probability, in (0, 1].
        top_k: Most probable tokens to choose from; 0 means all.
        seed: Of this request's draws, which then depend on nothing else; None: drawn.
        stop: Texts that end the request; they are not part of the output.
        stop_token_ids: Ids that end it besides the model's end-of-sequence ids.
        ignore_eos: Whether to generate past the model's end-of-sequence ids.
        logprobs: Alternatives to report with each token's log-probability; None: no
            log-probabilities. They are those of the model, before temperature, top-k and top-p.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """One sequence to continue.

    Attributes:
        id: Unique among the requests that are not finished.
        prompt_token_ids: At least one.
        sampling: See there.
    """

    id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """Log-probability of one generated token.

    Attributes:
        token_id: The token.
        logprob: Natural logarithm of its probability.
        top: (id, log-probability) of the most probable tokens, falling.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """Progress of a request: what to append to its output.

    Attributes:
        request_id: Of which request.
        token_ids: New tokens, the one that ended the request included.
        text: New text. It lags behind the tokens while a character is incomplete or a stop text
            may have begun; the last event brings the rest. Empty without a tokenizer.
        finish_reason: Set in the last event of a request, and only there.
        stop_reason: Stop text or token id that ended it, if one did.
        error: What went wrong, with finish_reason "error".
        logprobs: One for each of `token_ids` if asked for.
        rank: EP rank that serves the request; -1 if it never reached one.
        cached_tokens: Prompt tokens that the prefix cache had, the same in all events with tokens.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    rank: int = -1
    cached_tokens: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignment:
    """A request leaves the scheduler's queue for a rank."""

    request_id: str
    rank: int


class RequestScheduler(Protocol):
    """Queue of requests, and the choice of a rank for each; lives on rank 0.

    The engine calls it from its own thread only, `assign` before each step.
    """

    def add(self, request: EngineRequest, *, now: float) -> None:
        """Queue a request; `now` is seconds of a monotonic clock."""
        ...

    def remove(self, request_id: str) -> bool:
        """Forget a queued request (the client went away); False if it is not queued."""
        ...

    def assign(self, ranks: Sequence[RankLoad], *, now: float) -> list[Assignment]:
        """Requests to hand over now; the others stay queued.

        A rank takes any number: it queues what does not fit yet and starts it in order. `ranks`
        counts what was handed over before.
        """
        ...

    def finished(self, request_id: str, *, new_tokens: int) -> None:
        """A request that was handed over has ended, for whatever reason."""
        ...

    def replan(self, schedule: Schedule, decode_schedule: Schedule | None = None) -> None:
        """Experts have moved: go on with another plan's tables, for as many ranks.

        `decode_schedule` is that of generated tokens, if they have one of their own.
        """
        ...

    def __len__(self) -> int:
        """Queued requests."""
        ...


class Engine(Protocol):
    """The engine as rank 0's front sees it. Every method may be called from any thread."""

    @property
    def max_sequence_tokens(self) -> int:
        """Longest prompt plus output that can be served."""
        ...

    @property
    def healthy(self) -> bool:
        """Whether the loop runs and every rank answers; False once closed or failed."""
        ...

    @property
    def failure(self) -> str | None:
        """Why the engine failed, if it did."""
        ...

    def submit(self, request: EngineRequest, on_event: Callable[[TokenEvent], object]) -> None:
        """Take a request.

        Args:
            request: What to serve.
            on_event: Called from the engine's thread, must not block. The last call has a
                finish reason, also when the request is cancelled or the engine fails.

        Raises:
            RequestError: It can never be served as it is: empty, too long, a setting out of range.
            UnavailableError: The engine drains, is closed, or has failed.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End a request, whose KV blocks are free before the next step; unknown ids are ignored."""
        ...

    def stats(self) -> EngineStats:
        """Return counters and loads."""
        ...

    def reload_plan(self, plan: Path, decode_plan: Path | None = None) -> Future[Mapping[str, Any]]:
        """Move experts to the places of another plan, between two steps; requests go on.

        All ranks verify the moved weights and take them over, or none does. The result says what
        was moved ("experts_moved", "bytes_moved", "seconds", "sha256").

        Args:
            plan: Directory of the artefact.
            decode_plan: Of generated tokens, for an engine that has a plan for these.

        Raises (from the future):
            SemanticEPError: The plan is not for this model or group, or weights did not verify.
                The placement is as before.
        """
        ...

    def record(
        self, action: RecordAction, output: Path | None = None, *, phase: RecordedPhase = "all"
    ) -> Future[Mapping[str, Any]]:
        """Start or stop counting routing on all ranks, or write it as a profile.

        Args:
            action: "start" counts from zero; "dump" writes what was counted so far, before or
                after "stop".
            output: Directory of the profile artefact, for "dump".
            phase: Tokens to count, for "start".

        Returns:
            From "dump", "tokens" counted and "output"; else nothing.

        Raises (from the future):
            RequestError: Nothing is being recorded, or something already is.
            ArtifactError, OSError: The profile cannot be written.
        """
        ...

    def drain(self) -> Future[None]:
        """Refuse new requests; done when those taken have ended."""
        ...

    def close(self) -> None:
        """Cancel what is left and stop the loop on every rank; returns when rank 0's has ended."""
        ...


@contextmanager
def submitted(
    engine: Engine, requests: Sequence[EngineRequest]
) -> Iterator[AsyncIterator[TokenEvent]]:
    """Submit requests at once, and iterate over the events of all; leaving early cancels the rest.

    Called in a running event loop, where the events arrive.

    Raises:
        RequestError, UnavailableError: As `Engine.submit`, for any of them; none is served then.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[TokenEvent] = asyncio.Queue()
    unfinished: set[str] = set()

    def deliver(event: TokenEvent) -> None:
        # The loop may be gone while the server shuts down; then nobody listens any more.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(events.put_nowait, event)

    async def arriving() -> AsyncIterator[TokenEvent]:
        while unfinished:
            event = await events.get()
            if event.finish_reason is not None:
                unfinished.remove(event.request_id)
            yield event

    try:
        for request in requests:
            engine.submit(request, deliver)
            unfinished.add(request.id)
        yield arriving()
    finally:
        for request_id in unfinished:
            engine.cancel(request_id)
