"""The application: OpenAI's routes over an engine."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

from semantic_ep import __version__
from semantic_ep.errors import RequestError, UnavailableError
from semantic_ep.serve.http import schemas
from semantic_ep.serve.http.auth import ApiKeyMiddleware
from semantic_ep.serve.http.errors import ApiError, ErrorBody, install_handlers
from semantic_ep.serve.http.generation import (
    CLIENT_CLOSED_REQUEST,
    EventStream,
    Work,
    check,
    collect,
    new_id,
    unless_disconnected,
)
from semantic_ep.serve.http.limits import Admission, BodyLimitMiddleware
from semantic_ep.serve.protocol import Engine, TokenEvent, submitted

_DEFAULT_MAX_TOKENS = 16
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "the request is at fault"},
    503: {"model": ErrorBody, "description": "the server takes no requests now"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """What the front accepts.

    Attributes:
        model_name: What /v1/models lists.
        vocab_size: Token ids are below it (V).
        api_keys: Any of them admits; empty: everybody is admitted.
        max_body_bytes: Largest body of a request.
        max_running: Sequences that the engine works on at a time, for the estimate of Retry-After.
        max_waiting: Sequences that may wait beyond those.
    """

    model_name: str
    vocab_size: int
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 2**20
    max_running: int = 128
    max_waiting: int = 896


class Front:
    """What the routes share.

    Args:
        engine: Serves.
        tokenizer: Of transformers, fast.
        settings: See there.
    """

    def __init__(self, engine: Engine, tokenizer: Any, settings: HttpSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.created = int(time.time())
        self.admission = Admission(
            max_running=settings.max_running, max_waiting=settings.max_waiting
        )
        self._tokenizer = tokenizer
        # Long prompts would hold the event loop, and fast tokenizers are not re-entrant.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self.engine.healthy and not self.admission.draining

    def check_model(self, name: str) -> None:
        """Raise 404 unless it is the served model."""
        if name != self.settings.model_name:
            raise ApiError(
                404,
                f"the model {name!r} is not served here; it is {self.settings.model_name!r}",
                param="model",
                code="model_not_found",
            )

    async def token_ids(self, prompts: Sequence[str] | Sequence[list[int]]) -> list[list[int]]:
        """Token ids of prompts that are texts or ids.

        Raises:
            ApiError: 400, an id is not in the vocabulary, or a text cannot be encoded.
        """
        return [
            await self._in_thread(self._encode, prompt)
            if isinstance(prompt, str)
            else self._known(prompt)
            for prompt in prompts
        ]

    async def chat_token_ids(self, messages: Sequence[schemas.Message]) -> list[int]:
        """Token ids of a conversation, by the model's chat template.

        Raises:
            ApiError: 400, the model has no template, or it refuses the conversation.
        """
        turns = [message.for_template() for message in messages]
        return await self._in_thread(self._apply_template, turns)

    def start(self, held: ExitStack, work: Work) -> AsyncIterator[TokenEvent]:
        """Hand work to the engine, to be cancelled when `held` closes unless it has ended.

        Raises:
            ApiError: 400 it can never be served, 429 there is no room, 503 the engine is closed.
        """
        sequences, limit = len(work.requests), self.settings.max_running + self.settings.max_waiting
        if sequences > limit:
            raise ApiError(400, f"{sequences} sequences in one request; at most {limit}", param="n")
        held.enter_context(self.admission.admit(sequences))
        try:
            return held.enter_context(submitted(self.engine, work.requests))
        except RequestError as error:
            raise ApiError(400, str(error), code="invalid_value") from error
        except UnavailableError as error:
            raise ApiError(
                503, str(error), code="unavailable", retry_after=self.admission.retry_after()
            ) from error

    async def _in_thread(self, function: Any, *arguments: Any) -> list[int]:
        loop = asyncio.get_running_loop()
        ids: list[int] = await loop.run_in_executor(self._thread, function, *arguments)
        return ids

    def _encode(self, text: str) -> list[int]:
        try:
            return list(self._tokenizer(text)["input_ids"])
        except (UnicodeEncodeError, TypeError) as error:  # A lone surrogate.
            raise ApiError(400, f"the prompt is not valid text: {error}", param="prompt") from error

    def _apply_template(self, turns: list[dict[str, str]]) -> list[int]:
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise ApiError(
                400, "the model has no chat template; use /v1/completions", param="messages"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        except (TemplateError, UnicodeEncodeError, TypeError) as error:
            raise ApiError(
                400, f"the chat template refuses this conversation: {error}", param="messages"
            ) from error

    def _known(self, ids: list[int]) -> list[int]:
        if max(ids, default=0) >= self.settings.vocab_size:
            raise ApiError(
                400,
                f"token id {max(ids)} is not in the vocabulary of {self.settings.vocab_size}",
                param="prompt",
                code="invalid_value",
            )
        return ids


def create_app(front: Front) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(title="semantic_ep", version=__version__)
    install_handlers(app)
    _add_probes(app, front)
    _add_completions(app, front)
    _add_chat(app, front)
    settings = front.settings
    # The last one added sees a request first.
    app.add_middleware(BodyLimitMiddleware, max_bytes=settings.max_body_bytes)
    if settings.api_keys:
        app.add_middleware(ApiKeyMiddleware, keys=settings.api_keys)
    return app


def _add_probes(app: FastAPI, front: Front) -> None:
    @app.get("/health", responses=_ERRORS)
    async def health() -> dict[str, str]:
        """Whether the engine runs."""
        if not front.engine.healthy:
            raise ApiError(503, front.engine.failure or "the engine is closed", code="unhealthy")
        return {"status": "ok"}

    @app.get("/ready", responses=_ERRORS)
    async def ready() -> dict[str, str]:
        """Whether requests are taken."""
        if not front.ready:
            raise ApiError(
                503, front.engine.failure or "the server is about to stop", code="not_ready"
            )
        return {"status": "ready"}

    @app.get("/v1/models", responses=_ERRORS)
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


class Answer:
    """Builds the bodies of one response.

    Args:
        front: See there.
        id_: Of the response.
        usage: Whether a stream ends with the number of tokens.
    """

    def __init__(self, front: Front, id_: str, *, usage: bool) -> None:
        self.id = id_
        self._usage = usage
        self.head: dict[str, Any] = {
            "id": id_,
            "created": int(time.time()),
            "model": front.settings.model_name,
        }

    def whole(self, work: Work, choices: Sequence[Any]) -> BaseModel:
        """The body of a response that is no stream."""
        raise NotImplementedError

    def piece(self, index: int, event: TokenEvent) -> BaseModel:
        """One event of a stream."""
        raise NotImplementedError

    def last(self, usage: schemas.Usage) -> BaseModel:
        """The event of a stream that has the number of tokens."""
        raise NotImplementedError

    async def pieces(
        self, work: Work, events: AsyncIterator[TokenEvent]
    ) -> AsyncIterator[BaseModel]:
        """The events of a stream.

        Raises:
            ApiError: See `check`.
        """
        new_tokens = 0
        async for event in events:
            check(event)
            new_tokens += len(event.token_ids)
            if event.text or event.finish_reason:
                yield self.piece(work.index_of(event), event)
        if self._usage:
            yield self.last(work.usage(new_tokens))


class CompletionAnswer(Answer):
    """Bodies of `/v1/completions`."""

    def whole(self, work: Work, choices: Sequence[Any]) -> BaseModel:
        """See `Answer`."""
        return schemas.Completion(
            **self.head,
            choices=[
                schemas.CompletionChoice(index=index, text=c.text, finish_reason=c.finish_reason)
                for index, c in enumerate(choices)
            ],
            usage=work.usage(sum(choice.new_tokens for choice in choices)),
        )

    def piece(self, index: int, event: TokenEvent) -> BaseModel:
        """See `Answer`."""
        choice = schemas.CompletionChoice(
            index=index, text=event.text, finish_reason=event.finish_reason
        )
        return schemas.Completion(**self.head, choices=[choice])

    def last(self, usage: schemas.Usage) -> BaseModel:
        """See `Answer`."""
        return schemas.Completion(**self.head, choices=[], usage=usage)


class ChatAnswer(Answer):
    """Bodies of `/v1/chat/completions`."""

    def whole(self, work: Work, choices: Sequence[Any]) -> BaseModel:
        """See `Answer`."""
        return schemas.ChatCompletion(
            **self.head,
            choices=[
                schemas.ChatChoice(
                    index=index,
                    message=schemas.AssistantMessage(content=choice.text),
                    finish_reason=choice.finish_reason,
                )
                for index, choice in enumerate(choices)
            ],
            usage=work.usage(sum(choice.new_tokens for choice in choices)),
        )

    def piece(self, index: int, event: TokenEvent) -> BaseModel:
        """See `Answer`."""
        choice = schemas.ChatChunkChoice(
            index=index,
            delta=schemas.Delta(role="assistant", content=event.text),
            finish_reason=event.finish_reason,
        )
        return schemas.ChatCompletionChunk(**self.head, choices=[choice])

    def last(self, usage: schemas.Usage) -> BaseModel:
        """See `Answer`."""
        return schemas.ChatCompletionChunk(**self.head, choices=[], usage=usage)


def _add_completions(app: FastAPI, front: Front) -> None:
    @app.post("/v1/completions", responses=_ERRORS, response_model=schemas.Completion)
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
    @app.post("/v1/chat/completions", responses=_ERRORS, response_model=schemas.ChatCompletion)
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
