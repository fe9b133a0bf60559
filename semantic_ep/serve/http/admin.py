"""Routes of the operator: record served routing as a profile, and take over another plan.

The first three are SGLang's. Files stay inside one directory of the server's machine, which the
operator names when it starts: clients choose a name there, never a path.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from semantic_ep.errors import (
    ArtifactError,
    PeerFailureError,
    RequestError,
    SemanticEPError,
    UnavailableError,
)
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.serve.http.errors import ERRORS, ApiError
from semantic_ep.serve.http.front import Front
from semantic_ep.serve.protocol import RecordedPhase

# One part of a path, and not hidden.
Name = Annotated[str, Field(pattern="^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$")]


class ReloadRequest(BaseModel):
    """Body of `POST /reload_plan`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    plan: Name = Field(description="plan artefact in the server's admin directory")
    decode_plan: Name | None = Field(
        None, description="plan there for generated tokens, of a server that has one for these"
    )
    profile: Name | None = Field(
        None, description="profile there that it was made from; /metrics then tells the drift"
    )


class Recorded(BaseModel):
    """What was done."""

    status: str
    tokens: int | None = Field(None, description="counted so far, of a dump")
    profile: str | None = Field(None, description="name of the dump in the admin directory")


class Reloaded(BaseModel):
    """What was moved."""

    plan: str
    decode_plan: str | None = None
    experts_moved: int
    bytes_moved: int
    seconds: float
    sha256: str = Field(description="of the weights in logical order: the same under every plan")


def add_admin(app: FastAPI, front: Front, directory: Path) -> None:
    """Add the routes.

    Args:
        app: Where to.
        front: Of the server.
        directory: Where profiles are written to and plans read from.
    """

    # SGLang answers both methods.
    @app.get("/start_expert_distribution_record", responses=ERRORS)
    @app.post("/start_expert_distribution_record", responses=ERRORS)
    async def start_expert_distribution_record(phase: RecordedPhase = "all") -> Recorded:
        """Count routing from zero on all ranks: of prompts, of generated tokens, or of both."""
        await _outcome(front.engine.record("start", phase=phase))
        return Recorded(status="recording")

    @app.get("/stop_expert_distribution_record", responses=ERRORS)
    @app.post("/stop_expert_distribution_record", responses=ERRORS)
    async def stop_expert_distribution_record() -> Recorded:
        """Stop counting; what was counted can still be dumped."""
        await _outcome(front.engine.record("stop"))
        return Recorded(status="stopped")

    @app.get("/dump_expert_distribution_record", responses=ERRORS)
    @app.post("/dump_expert_distribution_record", responses=ERRORS)
    async def dump_expert_distribution_record() -> Recorded:
        """Write what was counted as a profile, from which `semantic-ep plan` makes a plan."""
        name = f"profile-{time.time_ns()}"
        told = await _outcome(front.engine.record("dump", directory / name), writes=True)
        return Recorded(status="dumped", tokens=told["tokens"], profile=name)

    @app.post("/reload_plan", responses=ERRORS)
    async def reload_plan(body: ReloadRequest) -> Reloaded:
        """Move experts to the places of another plan; requests go on."""
        profile = None
        if body.profile is not None:
            profile = await asyncio.to_thread(_read_profile, front, directory / body.profile)
        told = await _outcome(
            # Reads and verifies the plan before it asks the ranks.
            await asyncio.to_thread(
                front.engine.reload_plan,
                directory / body.plan,
                None if body.decode_plan is None else directory / body.decode_plan,
            )
        )
        front.metrics.profile = profile
        return Reloaded(plan=body.plan, decode_plan=body.decode_plan, **told)


def _read_profile(front: Front, path: Path) -> RoutingProfile:
    try:
        return front.checked(RoutingProfile.read(path), what=str(path))
    except SemanticEPError as error:
        raise _refused(error) from error


async def _outcome(future: Future[Mapping[str, Any]], *, writes: bool = False) -> Mapping[str, Any]:
    """Wait for what all ranks do together.

    Args:
        future: Of the engine.
        writes: Whether an artefact is written, and not read: then it is not the client's fault.

    Raises:
        ApiError: They refused (400), could not write (507), or a rank is lost (503).
    """
    try:
        return await asyncio.wrap_future(future)
    except SemanticEPError as error:
        if writes and isinstance(error, ArtifactError):
            raise ApiError(507, str(error), code="storage") from error
        raise _refused(error) from error
    except OSError as error:
        raise ApiError(507, f"the profile cannot be written: {error}", code="storage") from error


def _refused(error: SemanticEPError) -> ApiError:
    if isinstance(error, UnavailableError | PeerFailureError):
        return ApiError(503, str(error), code="unavailable")
    code = "invalid_state" if isinstance(error, RequestError) else "invalid_value"
    return ApiError(400, str(error), code=code)
