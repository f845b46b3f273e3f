"""What is asked of an engine, and what it gives back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from switchworks.config import ConfigError
from switchworks.generate import GenerationConfig

Experts = dict[str, list[int]]
"""The experts that a token was sent to, by switch layer; none where it was dropped."""
Reason = Literal["stop", "length", "cancelled", "deadline"]
"""Why a text ended: EOS or a stop text, its greatest length, its client, its time."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A text to be written."""

    ids: Sequence[int]
    """Of an encoder-decoder the input with its EOS, else the prompt without."""
    config: GenerationConfig = field(default_factory=GenerationConfig)
    """How it is written; `batch_size` and `compile` are the engine's."""
    candidates: int = 1
    """Samples, or the best of the beams."""
    priority: int = 0
    """Of those that wait the highest goes first, of several the oldest."""
    timeout: float | None = None
    """Seconds after which it ends with what there is."""
    stream: bool = False
    """Whether tokens are told as they are written. Not with beams or candidates."""
    experts: bool = False
    """Whether experts are told."""
    top: int = 0
    """Of each token so many of the likeliest are told."""

    def __post_init__(self) -> None:
        beams = self.config.beams.beams
        if self.stream and (beams > 1 or self.candidates > 1):
            raise ConfigError(
                f"stream needs one text, and there are beams = {beams}, candidates = "
                f"{self.candidates}.\n  Leave out stream, or the others."
            )
        if self.candidates < 1 or (self.candidates > max(1, beams) and not self._samples):
            raise ConfigError(
                f"candidates = {self.candidates} must lie between 1 and beams = {beams}.\n"
                "  Raise beams, or sample with a temperature."
            )
        if beams > 1 and self._samples:
            raise ConfigError(
                f"temperature = {self.config.sampling.temperature} samples, and beams = {beams} "
                "look for the likeliest text.\n  Choose one of them."
            )

    @property
    def _samples(self) -> bool:
        return self.config.sampling.temperature > 0

    @property
    def rows(self) -> int:
        """Texts that are written at once for it."""
        return max(self.config.beams.beams, self.candidates)


class Token(NamedTuple):
    """A token that was written."""

    id: int
    log_prob: float
    """ln p by the model itself, whatever chose the token."""
    experts: Experts
    """Of the decoder's layers where it was written; empty unless they were asked for."""
    top: list[tuple[int, float]]
    """The likeliest tokens in its place, with ln p."""


class Text(NamedTuple):
    """A text that was written."""

    tokens: list[Token]
    score: float
    """Of beams what they are ranked by, else ln p of the whole text."""
    reason: Reason


class Answer(NamedTuple):
    """All that was written for a request."""

    texts: list[Text]
    """The likeliest first."""
    input_experts: list[Experts]
    """Of each token that was read; empty unless they were asked for."""
    first_token_seconds: float | None
    """From its arrival; None if none was written."""
    seconds: float
    """From its arrival to its end."""


class Failure(NamedTuple):
    """The request could not be carried out."""

    error: Exception


Event = Token | Answer | Failure
Emit = Callable[[Event], None]
"""Takes the events of a request on the engine's thread: tokens if it streams, then one of the
others, which is the last. It must return at once."""
