"""Bodies of responses, whole or piece by piece, in both of OpenAI's shapes."""

from __future__ import annotations

import abc
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from pydantic import BaseModel

from semantic_ep.serve.http import schemas
from semantic_ep.serve.http.front import Front
from semantic_ep.serve.http.generation import Choice, Work, check
from semantic_ep.serve.protocol import TokenEvent, TokenLogprob

# JSON has no infinities; OpenAI and vLLM say this for a token that is all but impossible.
_LEAST_LOGPROB = -9999.0


class Answer(abc.ABC):
    """Builds the bodies of one response.

    Args:
        front: See there.
        id_: Of the response.
        usage: Whether a stream ends with the number of tokens.
    """

    def __init__(self, front: Front, id_: str, *, usage: bool) -> None:
        self._front = front
        self._usage = usage
        self.head: dict[str, Any] = {
            "id": id_,
            "created": int(time.time()),
            "model": front.settings.model_name,
        }

    @abc.abstractmethod
    def whole(self, work: Work, choices: Sequence[Choice]) -> BaseModel:
        """The body of a response that is no stream."""

    @abc.abstractmethod
    def piece(self, index: int, event: TokenEvent) -> BaseModel:
        """One event of a stream."""

    @abc.abstractmethod
    def last(self, usage: schemas.Usage) -> BaseModel:
        """The event of a stream that has the number of tokens."""

    async def pieces(
        self, work: Work, events: AsyncIterator[TokenEvent]
    ) -> AsyncIterator[BaseModel]:
        """The events of a stream.

        Raises:
            ApiError: See `check`.
        """
        new_tokens, cached = 0, {}
        async for event in events:
            check(event)
            new_tokens += len(event.token_ids)
            cached[work.index_of(event)] = event.cached_tokens
            if event.text or event.finish_reason or event.logprobs:
                yield self.piece(work.index_of(event), event)
        if self._usage:
            yield self.last(work.usage(new_tokens, cached))

    def text_of(self, token_id: int, logprob: float) -> tuple[str, float]:
        """A token as clients see it, and its log-probability."""
        return self._front.token_text(token_id), max(logprob, _LEAST_LOGPROB)


class CompletionAnswer(Answer):
    """Bodies of `/v1/completions`."""

    def __init__(self, front: Front, id_: str, *, usage: bool) -> None:
        super().__init__(front, id_, usage=usage)
        self._offsets: dict[int, int] = {}  # characters of the tokens told so far, by choice

    def whole(self, work: Work, choices: Sequence[Choice]) -> BaseModel:
        """See `Answer`."""
        return schemas.Completion(
            **self.head,
            choices=[
                schemas.CompletionChoice(
                    index=index,
                    text=choice.text,
                    finish_reason=choice.finish_reason,
                    logprobs=self._logprobs(index, choice.logprobs),
                )
                for index, choice in enumerate(choices)
            ],
            usage=_usage(work, choices),
        )

    def piece(self, index: int, event: TokenEvent) -> BaseModel:
        """See `Answer`."""
        choice = schemas.CompletionChoice(
            index=index,
            text=event.text,
            finish_reason=event.finish_reason,
            logprobs=self._logprobs(index, event.logprobs),
        )
        return schemas.Completion(**self.head, choices=[choice])

    def last(self, usage: schemas.Usage) -> BaseModel:
        """See `Answer`."""
        return schemas.Completion(**self.head, choices=[], usage=usage)

    def _logprobs(
        self, index: int, told: Sequence[TokenLogprob]
    ) -> schemas.CompletionLogprobs | None:
        if not told:
            return None
        own = [self.text_of(token.token_id, token.logprob) for token in told]
        offsets, offset = [], self._offsets.get(index, 0)
        for text, _ in own:
            offsets.append(offset)
            offset += len(text)
        self._offsets[index] = offset
        return schemas.CompletionLogprobs(
            tokens=[text for text, _ in own],
            token_logprobs=[logprob for _, logprob in own],
            # The chosen token is among them, whether or not it is one of the most probable.
            top_logprobs=[
                dict([*(self.text_of(*one) for one in token.top), chosen])
                for token, chosen in zip(told, own, strict=True)
            ],
            text_offset=offsets,
        )


class ChatAnswer(Answer):
    """Bodies of `/v1/chat/completions`."""

    def whole(self, work: Work, choices: Sequence[Choice]) -> BaseModel:
        """See `Answer`."""
        return schemas.ChatCompletion(
            **self.head,
            choices=[
                schemas.ChatChoice(
                    index=index,
                    message=schemas.AssistantMessage(content=choice.text),
                    finish_reason=choice.finish_reason,
                    logprobs=self._logprobs(choice.logprobs),
                )
                for index, choice in enumerate(choices)
            ],
            usage=_usage(work, choices),
        )

    def piece(self, index: int, event: TokenEvent) -> BaseModel:
        """See `Answer`."""
        choice = schemas.ChatChunkChoice(
            index=index,
            delta=schemas.Delta(role="assistant", content=event.text),
            finish_reason=event.finish_reason,
            logprobs=self._logprobs(event.logprobs),
        )
        return schemas.ChatCompletionChunk(**self.head, choices=[choice])

    def last(self, usage: schemas.Usage) -> BaseModel:
        """See `Answer`."""
        return schemas.ChatCompletionChunk(**self.head, choices=[], usage=usage)

    def _logprobs(self, told: Sequence[TokenLogprob]) -> schemas.ChatLogprobs | None:
        if not told:
            return None
        return schemas.ChatLogprobs(
            content=[
                schemas.TokenLogprobs(
                    **self._alternative(token.token_id, token.logprob),
                    top_logprobs=[
                        schemas.Alternative(**self._alternative(*one)) for one in token.top
                    ],
                )
                for token in told
            ]
        )

    def _alternative(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, logprob = self.text_of(token_id, logprob)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _usage(work: Work, choices: Sequence[Choice]) -> schemas.Usage:
    new_tokens = sum(choice.new_tokens for choice in choices)
    return work.usage(new_tokens, {n: choice.cached_tokens for n, choice in enumerate(choices)})
