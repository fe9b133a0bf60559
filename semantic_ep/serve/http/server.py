"""The HTTP server around the application: signals, draining, and the end when a rank is lost."""

from __future__ import annotations

import asyncio
import logging
import signal
from concurrent.futures import Future
from types import FrameType

import uvicorn

from semantic_ep.serve.http.app import create_app
from semantic_ep.serve.http.front import Front

logger = logging.getLogger(__name__)


class HttpServer(uvicorn.Server):
    """Serves until told to stop; then refuses new requests and finishes those under way.

    SIGTERM and SIGINT drain, a second SIGINT stops at once. Launchers send SIGTERM more than once.

    Args:
        front: See there.
        host: Address to listen at.
        port: Of it; 0: any that is free.
        drain_seconds: Bound of the drain; requests that are left then end with an error.
    """

    def __init__(self, front: Front, *, host: str, port: int, drain_seconds: float) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(front),
                host=host,
                port=port,
                log_level="warning",
                # After the drain, only writing the last bytes is left.
                timeout_graceful_shutdown=5,
            )
        )
        self._front = front
        self._drain_seconds = drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list | None = None) -> None:
        """Listen, and say where."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            logger.warning("serving at http://%s:%d", *self.address)

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return self.servers[0].sockets[0].getsockname()[:2]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain, or stop at once. Runs in the main thread, between two of its instructions."""
        again = self._front.admission.draining
        if self._loop is None or (again and sig == signal.SIGINT):
            self.should_exit = self.force_exit = True
        elif not again:
            self._front.admission.draining = True
            self._loop.call_soon_threadsafe(self._drain)

    def fail(self, error: BaseException) -> None:
        """A rank is lost: requests have been told, stop. Called from the engine's thread."""
        logger.error("the engine failed: %s", error)
        self.should_exit = True

    def _drain(self) -> None:
        self._front.engine.drain().add_done_callback(self._drained)
        assert self._loop is not None
        self._loop.call_later(self._drain_seconds, self._stop)

    def _drained(self, _: Future[None]) -> None:
        self._stop()

    def _stop(self) -> None:
        self.should_exit = True
