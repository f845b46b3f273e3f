"""What clients send and get, as the OpenAPI document shows it."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _check_text(text: str) -> str:
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("holds half of a surrogate pair, which is no character.")
    return text


String = Annotated[str, AfterValidator(_check_text)]
"""Text that has bytes in UTF-8: JSON can spell more."""
MOST = 2**63 - 1
FAIL_FAST = Field(fail_fast=True)
"""Checking ends at the first that is wrong: errors of a million would take seconds and a GB."""
Count = Annotated[int, Field(ge=1, le=MOST)]
Whole = Annotated[int, Field(ge=0, le=MOST)]
Token = Annotated[int, Field(ge=0, le=MOST)]
Tokens = Annotated[list[Token], FAIL_FAST]
Texts = Annotated[list[String], FAIL_FAST]
Finite = Annotated[float, Field(allow_inf_nan=False)]
TEMPERATURE = Field(ge=0, le=100, allow_inf_nan=False)


class Fields(BaseModel):
    """Of a request: names that are not known are refused, so that no setting is lost by a typo, and
    so are "5" and true where a number is due."""

    model_config = ConfigDict(extra="forbid", strict=True)


class GenerateRequest(Fields):
    """A text whose holes are to be filled, or that is to be continued."""

    text: String = Field(examples=["The <extra_id_0> of the list is <extra_id_1>."])
    """With holes <extra_id_0>, <extra_id_1>, ...; without one it is continued."""
    model: str | None = None
    """One of /v1/models; the first."""
    max_length: Count = 64
    min_length: Whole = 0
    temperature: Annotated[float, TEMPERATURE] = 0.0
    """0: the likeliest tokens."""
    top_k: Count | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Whole = 0
    beams: Count = 1
    candidates: Count = 1
    """Texts of the answer: samples, or the best of the beams."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    no_repeat_ngram: Whole = 0
    stop: list[Annotated[String, Field(min_length=1)]] = Field(default=[], max_length=16)
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Seconds; what is written by then is the answer."""
    stream: bool = False
    experts: bool = False
    """Whether to tell which experts each token was sent to."""


class ReadToken(BaseModel):
    """A token that the model has read."""

    id: int
    text: str
    experts: dict[str, list[int]] | None = None
    """By switch layer."""


class WrittenToken(ReadToken):
    """A token that the model has written."""

    log_prob: float
    """ln p by the model itself, whatever chose the token."""


class Choice(BaseModel):
    """A text of the answer."""

    text: str
    """Whole, with fills in [square brackets]."""
    fills: dict[int, str]
    """By number of the hole."""
    score: float
    """Of beams what they are ranked by, else ln p of all tokens together."""
    probability: float
    """exp(score)."""
    tokens: list[WrittenToken]
    finish_reason: Literal["stop", "length", "cancelled", "deadline"]


class GenerateUsage(BaseModel):
    """What the answer took."""

    prompt_tokens: int
    completion_tokens: int
    seconds: float
    first_token_seconds: float | None = None
    """From arrival; none if no token was written in time."""
    tokens_per_second: float


class GenerateAnswer(BaseModel):
    """The answer to a GenerateRequest; with `stream` the last event."""

    id: str
    model: str
    choices: list[Choice]
    input: list[ReadToken]
    usage: GenerateUsage


class RoutingRequest(Fields):
    """A text, and what was written for it."""

    text: String
    output: Tokens = Field(default=[], max_length=100_000)
    """Tokens of a GenerateAnswer."""
    model: str | None = None


class RoutingAnswer(BaseModel):
    """Of each token the likeliest experts, with probabilities."""

    input: list[ReadToken]
    output: list[ReadToken]
    layers: dict[str, list[list[tuple[int, float]]]]
    """Of encoder layers those of the input, of decoder layers those of the output; of a
    decoder-only model both."""


class CompletionRequest(BaseModel):
    """As OpenAI's. Settings of it that are not here are refused unless they change nothing."""

    model_config = ConfigDict(extra="allow", strict=True)

    prompt: String | Texts | Tokens | Annotated[list[Tokens], FAIL_FAST]
    """Texts, or their tokens (of an encoder-decoder without EOS)."""
    model: str | None = None
    max_tokens: Whole = 16
    temperature: Annotated[float, TEMPERATURE] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Count | None = None
    n: Count = 1
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    """Of decoder-only models: the prompt comes before what is written, with its log-probs."""
    stop: String | Annotated[list[String], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None

    _NEUTRAL = {
        **{"best_of": (1,), "frequency_penalty": (0,), "presence_penalty": (0,)},
        **{"logit_bias": ({},), "suffix": ("",)},
    }

    @model_validator(mode="after")
    def _check_others(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name == "user" or value is None or value in self._NEUTRAL.get(name, ()):
                continue
            raise ValueError(f"{name} is not supported. Leave it out.")
        return self


class LogProbs(BaseModel):
    """Of each token; as OpenAI's."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """A text of the answer."""

    index: int
    text: str
    logprobs: LogProbs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Usage(BaseModel):
    """Tokens, as OpenAI counts them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """The answer to a CompletionRequest; with `stream` an event."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "switchworks"
    decoder_only: bool
    layers: dict[str, int]
    """Experts of each switch layer."""
    parameters: int
    active_parameters: int
    max_input: int
    max_length: int


class ModelList(BaseModel):
    """All models, the one first that is used where none is named."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class CacheStatus(BaseModel):
    """Experts read from disk."""

    hits: int
    misses: int
    bytes: int


class EngineStatus(BaseModel):
    """What a model is doing."""

    running: int
    waiting: int
    tokens_per_second: float
    """While at work."""
    expert_cache: CacheStatus | None = None


class Status(BaseModel):
    """What the server is doing."""

    models: dict[str, EngineStatus]
    resident_bytes: int
    uptime_seconds: float


class ErrorText(BaseModel):
    """Why there is no answer."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """As OpenAI's."""

    error: ErrorText
