"""Bodies of requests and responses, as OpenAI documents them.

A field that is not known, or asks for what this server does not do, is refused: a client that is
told nothing would take an answer for something it is not. `top_k`, `ignore_eos` and
`stop_token_ids` are vLLM's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from semantic_ep.serve.protocol import SamplingParams

MAX_STOPS = 16
MAX_CHOICES = 128
MAX_ALTERNATIVES = 20


class _Body(BaseModel):
    # strict: "5" is not a number, and true is not 1.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _only(neutral: object) -> AfterValidator:
    """Accept the value that changes nothing, refuse every other."""

    def check(value: Any) -> Any:
        if value is not None and value != neutral:
            raise ValueError("this is not supported; leave it out")
        return value

    return AfterValidator(check)


StopString = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = NonNegativeInt
Finite = Annotated[float, Field(allow_inf_nan=False)]


class StreamOptions(_Body):
    """What a stream holds besides the text."""

    include_usage: bool = False
    include_obfuscation: Annotated[bool | None, _only(False)] = None


class _Generation(_Body):
    """Fields that both kinds of completion share."""

    model: str = Field(description="the name that /v1/models lists")
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(
        None, description="-1 or 0: all tokens"
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="accepted, and not used")
    frequency_penalty: Annotated[Finite | None, _only(0)] = None
    presence_penalty: Annotated[Finite | None, _only(0)] = None
    logit_bias: Annotated[dict[str, float] | None, _only({})] = None

    @property
    def alternatives(self) -> int | None:
        """Alternatives to report with each token's log-probability; None: no log-probabilities."""
        return None

    def sampling(self, *, max_tokens: int) -> SamplingParams:
        """What the engine is asked for; OpenAI's defaults."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            seed=self.seed,
            stop=stops,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            logprobs=self.alternatives,
        )


class CompletionRequest(_Generation):
    """Body of `POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[list[TokenId]], Field(min_length=1)]
    ) = Field(description="text or token ids; a list of either is served as several requests")
    max_tokens: PositiveInt | None = Field(None, description="default 16")
    best_of: Annotated[int | None, _only(1)] = None
    echo: Annotated[bool | None, _only(False)] = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = Field(
        None, description="alternatives to report with each token's log-probability"
    )
    suffix: Annotated[str | None, _only("")] = None

    @property
    def alternatives(self) -> int | None:
        """See `_Generation`."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, always as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TextPart(_Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """What chat templates read."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": text, **named}


class TextFormat(_Body):
    """The only response format there is."""

    type: Literal["text"]


class ChatCompletionRequest(_Generation):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: PositiveInt | None = Field(None, description="older name of the next")
    max_completion_tokens: PositiveInt | None = Field(
        None, description="default: what the model's context leaves"
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = Field(
        None, description="alternatives to each token; needs logprobs"
    )
    response_format: TextFormat | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError('"top_logprobs" needs "logprobs": true')
        return self

    @property
    def alternatives(self) -> int | None:
        """See `_Generation`."""
        return (self.top_logprobs or 0) if self.logprobs else None


FinishReason = Literal["stop", "length"]


class _Response(BaseModel):
    model_config = ConfigDict(frozen=True)


class PromptTokensDetails(_Response):
    """Prompt tokens that were in the cache and therefore not computed."""

    cached_tokens: int


class Usage(_Response):
    """Tokens of all choices together; each prompt is counted once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(_Response):
    """Log-probabilities of a text's tokens, in its order."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(_Response):
    """A text, or in a stream the next piece of one."""

    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: CompletionLogprobs | None = None


class Completion(_Response):
    """Response of `POST /v1/completions`, or one event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Alternative(_Response):
    """A token that the model might have chosen."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(Alternative):
    """The token that it chose."""

    top_logprobs: list[Alternative]


class ChatLogprobs(_Response):
    """Log-probabilities of an answer's tokens, in its order."""

    content: list[TokenLogprobs]
    refusal: None = None


class AssistantMessage(_Response):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(_Response):
    """One answer."""

    index: int
    message: AssistantMessage
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None = None


class ChatCompletion(_Response):
    """Response of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(_Response):
    """The next piece of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(_Response):
    """The next piece of one answer."""

    index: int
    delta: Delta
    finish_reason: FinishReason | None = None
    logprobs: ChatLogprobs | None = None


class ChatCompletionChunk(_Response):
    """One event of the stream of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Model(_Response):
    """A model that can be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "semantic_ep"
    max_model_len: int


class ModelList(_Response):
    """Response of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]
