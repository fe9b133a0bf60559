"""What the routes share: the engine, the tokenizer, and the bounds on what clients may ask."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.errors import RequestError, UnavailableError
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.serve.http import schemas
from semantic_ep.serve.http.errors import ApiError
from semantic_ep.serve.http.generation import Work
from semantic_ep.serve.http.limits import Admission
from semantic_ep.serve.http.metrics import Metrics, Timed
from semantic_ep.serve.protocol import Engine, TokenEvent, submitted


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
        admin_dir: Where profiles are written to and plans read from; None: no such routes.
        fingerprint: Of the served model.
    """

    model_name: str
    vocab_size: int
    fingerprint: ModelFingerprint
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 2**20
    max_running: int = 128
    max_waiting: int = 896
    admin_dir: Path | None = None


class Front:
    """What the routes share.

    Args:
        engine: Serves.
        tokenizer: Of transformers, fast.
        settings: See there.
        profile: See `Metrics`.

    Raises:
        FingerprintError: The profile is of another model.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        settings: HttpSettings,
        *,
        profile: RoutingProfile | None = None,
    ) -> None:
        self.engine = engine
        self.settings = settings
        if profile is not None:
            self.checked(profile, what="--profile")
        self.metrics = Metrics(engine, model_name=settings.model_name, profile=profile)
        # Of each token id that log-probabilities name.
        self.token_text = functools.lru_cache(maxsize=2**16)(self._token_text)
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

    def checked(self, profile: RoutingProfile, *, what: str) -> RoutingProfile:
        """The profile, if it is of the served model; its routers may have been trained since.

        Raises:
            FingerprintError: It is not.
        """
        profile.fingerprint.check(self.settings.fingerprint, what=what, allow_retrained=True)
        return profile

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
            ApiError: 400, an id is not in the model's vocabulary, which the tokenizer's may exceed,
                or a text cannot be encoded.
        """
        return [
            self._known(
                await self._in_thread(self._encode, prompt) if isinstance(prompt, str) else prompt
            )
            for prompt in prompts
        ]

    async def chat_token_ids(self, messages: Sequence[schemas.Message]) -> list[int]:
        """Token ids of a conversation, by the model's chat template.

        Raises:
            ApiError: 400, the model has no template, or it refuses the conversation, or an id is
                not in the model's vocabulary.
        """
        turns = [message.for_template() for message in messages]
        return self._known(await self._in_thread(self._apply_template, turns), param="messages")

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
            events = held.enter_context(submitted(self.engine, work.requests))
        except RequestError as error:
            raise ApiError(400, str(error), code="invalid_value") from error
        except UnavailableError as error:
            raise ApiError(
                503, str(error), code="unavailable", retry_after=self.admission.retry_after()
            ) from error
        lengths = {request.id: len(request.prompt_token_ids) for request in work.requests}
        return held.enter_context(Timed(self.metrics, lengths)).observe(events)

    async def _in_thread(self, function: Any, *arguments: Any) -> list[int]:
        loop = asyncio.get_running_loop()
        ids: list[int] = await loop.run_in_executor(self._thread, function, *arguments)
        return ids

    def _token_text(self, token_id: int) -> str:
        text: str = self._tokenizer.decode([token_id])
        return text

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

    def _known(self, ids: list[int], *, param: str = "prompt") -> list[int]:
        if max(ids, default=0) >= self.settings.vocab_size:
            raise ApiError(
                400,
                f"token id {max(ids)} is not in the vocabulary of {self.settings.vocab_size}",
                param=param,
                code="invalid_value",
            )
        return ids
