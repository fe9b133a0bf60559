"""Bounds on what clients can make the server hold: bodies, and requests under way."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from semantic_ep.serve.http.errors import ApiError

_BODY_TIMEOUT_SECONDS = 30.0
_RECENT_REQUESTS = 64


class BodyLimitMiddleware:
    """Reads the body before the application sees the request; refuses large and slow ones.

    Args:
        app: What to protect.
        max_bytes: Largest body.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request with its body on, or answer 408 or 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(scope, receive), _BODY_TIMEOUT_SECONDS)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        except TimeoutError:
            error = ApiError(408, f"the body did not arrive within {_BODY_TIMEOUT_SECONDS:.0f} s")
            await error.response()(scope, receive, send)
            return
        if body is None:
            return
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, or None if the client went away."""
        announced = Headers(scope=scope).get("content-length", "0")
        # The server has refused lengths that are not numbers.
        if int(announced) > self._max_bytes:
            raise self._too_large(f"{announced} bytes")
        pieces, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self._max_bytes:
                raise self._too_large("more")
            if not message.get("more_body", False):
                return b"".join(pieces)

    def _too_large(self, got: str) -> ApiError:
        return ApiError(
            413,
            f"the body is too large: {got}, where at most {self._max_bytes} bytes are accepted",
            code="body_too_large",
        )


class Admission:
    """Counts the requests under way, and refuses more than there may be.

    Args:
        max_running: Requests that the engine works on at a time.
        max_waiting: Requests that may wait for it beyond those.
    """

    def __init__(self, *, max_running: int, max_waiting: int) -> None:
        self._max_running = max_running
        self._limit = max_running + max_waiting
        self._recent_seconds: deque[float] = deque(maxlen=_RECENT_REQUESTS)
        self.under_way = 0
        self.draining = False

    @contextmanager
    def admit(self, sequences: int = 1) -> Iterator[None]:
        """Hold the places of one HTTP request's sequences for as long as the block runs.

        Raises:
            ApiError: 429 if there is no room, 503 if the server is about to stop.
        """
        if self.draining:
            raise ApiError(
                503, "the server is about to stop", code="draining", retry_after=self.retry_after()
            )
        if self.under_way + sequences > self._limit:
            raise ApiError(
                429,
                f"{self.under_way} sequences are under way and {sequences} more were asked for, "
                f"where at most {self._limit} are accepted",
                code="queue_full",
                retry_after=self.retry_after(),
            )
        self.under_way += sequences
        start = time.monotonic()
        try:
            yield
        finally:
            self.under_way -= sequences
            self._recent_seconds.append(time.monotonic() - start)

    def retry_after(self) -> int:
        """Whole seconds after which a place should be free, judged by recent requests."""
        if not self._recent_seconds:
            return 1
        mean = sum(self._recent_seconds) / len(self._recent_seconds)
        waves = max(self.under_way / self._max_running, 1)
        return max(1, math.ceil(mean * waves / 2))
