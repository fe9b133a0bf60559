"""A request while it is served: its tokens, its blocks and its text."""

from __future__ import annotations

import random
from typing import Any

from semantic_ep.serve.blocks import block_name
from semantic_ep.serve.protocol import EngineRequest, FinishReason


class Sequence:
    """One request on the rank that serves it.

    Args:
        request: What to serve.
        stop_ids: The model's end-of-sequence ids.
        tokenizer: Of transformers, fast; None: no text.

    Attributes:
        tokens: Prompt and what was generated.
        computed: Positions whose keys and values are in the cache.
        blocks: Blocks of the cache that the sequence holds.
        cached_tokens: Prompt tokens that were in the cache when it first started; None before, or
            without a prefix cache.
        draws: Its random numbers; they survive a pre-emption.
    """

    def __init__(
        self, request: EngineRequest, *, stop_ids: frozenset[int], tokenizer: Any = None
    ) -> None:
        self.request = request
        self.tokens = list(request.prompt_token_ids)
        self.computed = 0
        self.blocks: list[int] = []
        self.cached_tokens: int | None = None
        self._names: list[bytes] = []
        self.draws = random.Random(request.sampling.seed)
        own = frozenset(request.sampling.stop_token_ids)
        self._stop_ids = own if request.sampling.ignore_eos else own | stop_ids
        self._text = None if tokenizer is None else _Text(tokenizer, request.sampling.stop)

    @property
    def pending(self) -> int:
        """Tokens to run before the next one can be chosen."""
        return len(self.tokens) - self.computed

    @property
    def longest(self) -> int:
        """Tokens that the prompt and all that may be generated come to."""
        return len(self.request.prompt_token_ids) + self.request.sampling.max_tokens

    @property
    def num_new(self) -> int:
        """Tokens generated."""
        return len(self.tokens) - len(self.request.prompt_token_ids)

    def block_names(self, count: int, block_size: int) -> list[bytes]:
        """Names of the first blocks, all of whose tokens are known."""
        for number in range(len(self._names), count):
            before = self._names[-1] if self._names else b""
            start = number * block_size
            self._names.append(block_name(before, self.tokens[start : start + block_size]))
        return self._names[:count]

    def append(self, token: int) -> tuple[str, FinishReason | None, str | int | None]:
        """Take a generated token.

        Returns:
            Text to append to the output, and if this ends the request, why, and at which stop
            text or id.
        """
        self.tokens.append(token)
        if token in self._stop_ids:
            return self._rest(), "stop", token
        text, stop_text = ("", None) if self._text is None else self._text.append(token)
        if stop_text is not None:
            return text, "stop", stop_text
        if self.num_new >= self.request.sampling.max_tokens:
            return text + self._rest(), "length", None
        return text, None, None

    def _rest(self) -> str:
        return "" if self._text is None else self._text.rest()


class _Text:
    """Text of generated tokens, released as soon as it is certain."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._stop = stop
        self._held = ""
        self._decoded = 0

    def append(self, token: int) -> tuple[str, str | None]:
        """Return text that is certain now, and the stop text if one was completed."""
        self._ids.append(token)
        piece = self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        self._decoded += len(piece)
        self._held += piece
        found = [(at, text) for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            at, text = min(found)
            released, self._held = self._held[:at], ""
            return released, text
        keep = max((_overlap(self._held, text) for text in self._stop), default=0)
        released = self._held[: len(self._held) - keep]
        self._held = self._held[len(released) :]
        return released, None

    def rest(self) -> str:
        """What is still held back, with the unfinished character that the last tokens left."""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return self._held + whole[self._decoded :]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that a stop text begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
