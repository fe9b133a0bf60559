"""The application: OpenAI's routes over an engine."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from semantic_ep import __version__
from semantic_ep.serve.http import schemas
from semantic_ep.serve.http.admin import add_admin
from semantic_ep.serve.http.answers import Answer, ChatAnswer, CompletionAnswer
from semantic_ep.serve.http.auth import ApiKeyMiddleware
from semantic_ep.serve.http.errors import ERRORS, ApiError, install_handlers
from semantic_ep.serve.http.front import Front
from semantic_ep.serve.http.generation import (
    CLIENT_CLOSED_REQUEST,
    EventStream,
    Work,
    collect,
    new_id,
    unless_disconnected,
)
from semantic_ep.serve.http.limits import BodyLimitMiddleware

_DEFAULT_MAX_TOKENS = 16


def create_app(front: Front) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(title="semantic_ep", version=__version__)
    install_handlers(app)
    _add_probes(app, front)
    _add_completions(app, front)
    _add_chat(app, front)
    if front.settings.admin_dir is not None:
        add_admin(app, front, front.settings.admin_dir)
    settings = front.settings
    # The last one added sees a request first.
    app.add_middleware(BodyLimitMiddleware, max_bytes=settings.max_body_bytes)
    if settings.api_keys:
        app.add_middleware(ApiKeyMiddleware, keys=settings.api_keys)
    return app


def _add_probes(app: FastAPI, front: Front) -> None:
    @app.get("/health", responses=ERRORS)
    async def health() -> dict[str, str]:
        """Whether the engine runs."""
        if not front.engine.healthy:
            raise ApiError(503, front.engine.failure or "the engine is closed", code="unhealthy")
        return {"status": "ok"}

    @app.get("/ready", responses=ERRORS)
    async def ready() -> dict[str, str]:
        """Whether requests are taken."""
        if not front.ready:
            raise ApiError(
                503, front.engine.failure or "the server is about to stop", code="not_ready"
            )
        return {"status": "ready"}

    @app.get("/metrics", responses=ERRORS, response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters and times, for Prometheus."""
        return Response(front.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", responses=ERRORS)
    async def models() -> schemas.ModelList:
        """The one model."""
        model = schemas.Model(
            id=front.settings.model_name,
            created=front.created,
            max_model_len=front.engine.max_sequence_tokens,
        )
        return schemas.ModelList(data=[model])


async def _answer(
    request: Request, front: Front, work: Work, answer: Answer, *, stream: bool | None
) -> Any:
    """Serve, as a stream of the answer's events or as its one body."""
    held = ExitStack()
    with held:
        events = front.start(held, work)
        if stream:
            return EventStream(answer.pieces(work, events), held.pop_all())
        choices = await unless_disconnected(request, collect(work, events))
        if choices is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return answer.whole(work, choices)


def _add_completions(app: FastAPI, front: Front) -> None:
    @app.post("/v1/completions", responses=ERRORS, response_model=schemas.Completion)
    async def completions(request: Request, body: schemas.CompletionRequest) -> Any:
        """Continue prompts."""
        front.check_model(body.model)
        prompts = await front.token_ids(body.prompts)
        id_ = new_id("cmpl")
        limit = body.max_tokens or _DEFAULT_MAX_TOKENS
        work = Work.of(id_, prompts, body.n or 1, body.sampling(max_tokens=limit))
        answer = CompletionAnswer(front, id_, usage=_wants_usage(body))
        return await _answer(request, front, work, answer, stream=body.stream)


def _add_chat(app: FastAPI, front: Front) -> None:
    @app.post("/v1/chat/completions", responses=ERRORS, response_model=schemas.ChatCompletion)
    async def chat_completions(request: Request, body: schemas.ChatCompletionRequest) -> Any:
        """Answer a conversation."""
        front.check_model(body.model)
        prompt = await front.chat_token_ids(body.messages)
        limit = body.max_completion_tokens or body.max_tokens
        left = max(front.engine.max_sequence_tokens - len(prompt), 1)
        id_ = new_id("chatcmpl")
        work = Work.of(id_, [prompt], body.n or 1, body.sampling(max_tokens=limit or left))
        answer = ChatAnswer(front, id_, usage=_wants_usage(body))
        return await _answer(request, front, work, answer, stream=body.stream)


def _wants_usage(body: Any) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage
