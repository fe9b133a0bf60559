"""API keys: from the environment or a file, never from the command line, which others can read."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from semantic_ep.errors import ConfigError, explain
from semantic_ep.serve.http.errors import ApiError

API_KEY_VARIABLE = "SEMANTIC_EP_API_KEY"
# Probes of a load balancer carry no key.
_OPEN_PATHS = frozenset({"/health", "/ready"})
_MIN_KEY_LENGTH = 8


def read_api_keys(
    file: Path | None, *, environment: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Keys that clients may use; empty if there is neither a variable nor a file.

    Args:
        file: One key a line, so that a new key can be added before the old one is withdrawn.
        environment: Variables; None means `os.environ`.

    Raises:
        ConfigError: The file cannot be read or holds no key, or a key is too short.
    """
    environment = os.environ if environment is None else environment
    found: list[tuple[str, str]] = []
    if API_KEY_VARIABLE in environment:
        found.append((API_KEY_VARIABLE, environment[API_KEY_VARIABLE].strip()))
    if file is not None:
        where = f"--api-key-file {file}"
        try:
            lines = [line.strip() for line in file.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(explain(f"cannot read the keys: {error}", where=where)) from error
        keys = [line for line in lines if line]
        if not keys:
            raise ConfigError(explain("holds no key", where=where, do="Write one key a line"))
        found += [(where, key) for key in keys]
    for where, key in found:
        if len(key) < _MIN_KEY_LENGTH or not key.isascii():
            raise ConfigError(
                explain(
                    "this API key is too easy to guess, or cannot be sent in a header",
                    where=where,
                    got=f"{len(key)} characters",
                    allowed=f"at least {_MIN_KEY_LENGTH} ASCII characters",
                )
            )
    return tuple(key for _, key in found)


class ApiKeyMiddleware:
    """Refuses requests without one of the keys, in time that does not depend on the keys."""

    def __init__(self, app: ASGIApp, *, keys: tuple[str, ...]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS or self._admits(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
            code="invalid_api_key",
        )
        await error.response()(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        digest = _digest(key.strip().encode("latin-1"))
        # All are compared, and digests have one length: nothing is learned from the time taken.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches) and scheme.lower() == "bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
