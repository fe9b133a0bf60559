"""Errors that a user can act on.

Every message answers five questions: what is wrong, where it came from (JSON path and flag, or
file), what was found, what is allowed, and what to do. `SemanticEPError` is the common base, so
that a launcher can print one clean line instead of a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class SemanticEPError(Exception):
    """Base of all errors raised on purpose by this package."""


class ConfigError(SemanticEPError, ValueError):
    """A setting, flag or environment variable is unknown, mistyped or impossible."""


class ArtifactError(SemanticEPError, ValueError):
    """An artefact on disk is missing, truncated, altered, or of the wrong kind or schema."""


class FingerprintError(ArtifactError):
    """An artefact belongs to another model than the one at hand."""


class PlacementError(SemanticEPError, ValueError):
    """A placement is malformed, or illegal for a router."""


class CheckpointError(SemanticEPError, ValueError):
    """A checkpoint is missing pieces, corrupt, or already carries a layout."""


class BackendError(SemanticEPError, RuntimeError):
    """A dispatch backend, library or process group cannot do what was asked of it."""


class PeerFailureError(SemanticEPError, RuntimeError):
    """Another rank died or stopped answering."""


class RequestError(SemanticEPError, ValueError):
    """A request to a server can never be served as it is."""


class UnavailableError(SemanticEPError, RuntimeError):
    """A server takes no requests now: it is full, draining, closed or has failed."""


def explain(
    what: str,
    *,
    where: str | None = None,
    got: object = None,
    allowed: object = None,
    do: str | None = None,
) -> str:
    """Compose a message in the house form.

    Args:
        what: The fact, as a sentence without its full stop.
        where: File, JSON path or flag that holds the culprit.
        got: The offending value; shown with `repr` unless it is a string.
        allowed: The valid values or range.
        do: What the reader should do next.
    """
    parts = [f"{where}: {what}" if where else what]
    if got is not None:
        parts[0] += f" (got {got if isinstance(got, str) else repr(got)})"
    if allowed is not None:
        parts.append(f"Allowed: {_listed(allowed)}")
    if do is not None:
        parts.append(do)
    return " ".join(part if part.endswith(("?", ".")) else f"{part}." for part in parts)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known name closest to `word`, or None if none is close."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def _listed(allowed: object) -> str:
    if isinstance(allowed, str):
        return allowed
    if isinstance(allowed, Sequence | set | frozenset):
        return ", ".join(str(item) for item in allowed)
    return str(allowed)
