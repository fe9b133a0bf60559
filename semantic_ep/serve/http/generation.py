"""From a request's sequences to its answer: collected, or piece by piece."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from semantic_ep.serve.http.errors import ApiError
from semantic_ep.serve.http.schemas import PromptTokensDetails, Usage
from semantic_ep.serve.protocol import (
    EngineRequest,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
)

_T = TypeVar("_T")
# What web servers write in their logs for a client that went away; nobody receives it.
CLIENT_CLOSED_REQUEST = 499


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The sequences of one HTTP request: n for each prompt, in order.

    Attributes:
        requests: For the engine.
        prompt_tokens: Of all prompts, each counted once.
        choices: Sequences of each prompt (n).
    """

    requests: Sequence[EngineRequest]
    prompt_tokens: int
    choices: int

    @classmethod
    def of(
        cls, id_: str, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams
    ) -> Work:
        """Name the sequences; with a seed, each choice of a prompt has its own."""
        requests = []
        for prompt in prompts:
            for choice in range(n):
                seed = None if sampling.seed is None else sampling.seed + choice
                requests.append(
                    EngineRequest(
                        id=f"{id_}-{len(requests)}",
                        prompt_token_ids=prompt,
                        sampling=dataclasses.replace(sampling, seed=seed),
                    )
                )
        return cls(requests=requests, prompt_tokens=sum(map(len, prompts)), choices=n)

    def index_of(self, event: TokenEvent) -> int:
        """Which choice an event is about."""
        return int(event.request_id.rpartition("-")[2])

    def usage(self, new_tokens: int, cached: Mapping[int, int]) -> Usage:
        """Tokens of all choices together.

        Args:
            new_tokens: Generated.
            cached: Prompt tokens that the cache had, by choice. Those of a prompt are the ones
                that none of its choices computed.
        """
        each = [cached.get(index, 0) for index in range(len(self.requests))]
        prompts = [
            each[start : start + self.choices] for start in range(0, len(each), self.choices)
        ]
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=new_tokens,
            total_tokens=self.prompt_tokens + new_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(map(min, prompts))),
        )


@dataclasses.dataclass(kw_only=True)
class Choice:
    """What one sequence has brought so far."""

    text: str = ""
    new_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)


def new_id(prefix: str) -> str:
    """An id that no other request has."""
    return f"{prefix}-{uuid.uuid4().hex}"


def check(event: TokenEvent) -> None:
    """Raise if a sequence ended without being complete.

    Raises:
        ApiError: 503, the engine failed, or the server stops.
    """
    if event.finish_reason in ("error", "cancelled"):
        reason = event.error or "the server stopped before the answer was complete"
        raise ApiError(503, reason, code="engine_failed" if event.error else "stopped")


async def collect(work: Work, events: AsyncIterator[TokenEvent]) -> list[Choice]:
    """Wait for all sequences.

    Raises:
        ApiError: See `check`.
    """
    choices = [Choice() for _ in work.requests]
    async for event in events:
        check(event)
        choice = choices[work.index_of(event)]
        choice.text += event.text
        choice.new_tokens += len(event.token_ids)
        choice.cached_tokens = event.cached_tokens
        choice.finish_reason = event.finish_reason
        choice.logprobs += event.logprobs
    return choices


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, _T]) -> _T | None:
    """Run `work`, and cancel it when the client goes away; None then."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events, and what to let go when they end or the client goes away.

    Args:
        events: Bodies of the events.
        held: Closed in the end, however it comes.
    """

    def __init__(self, events: AsyncIterator[BaseModel], held: ExitStack) -> None:
        super().__init__(_encoded(events), media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-cache"
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        with self._held:
            await super().__call__(scope, receive, send)


async def _encoded(events: AsyncIterator[BaseModel]) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield f"data: {event.model_dump_json()}\n\n"
    except ApiError as error:
        # The status is sent already: the error comes in the stream, which then ends without DONE.
        yield f"data: {error.response().body.decode()}\n\n"
    else:
        yield "data: [DONE]\n\n"
