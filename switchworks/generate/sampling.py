"""How the next token is chosen from its scores.

Letters: B sequences, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from switchworks.config import ConfigError

LEAST = 1e-4
"""The least temperature but 0. Less would choose as 0 does, and scores divided by it may leave
float32."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Temperature 0 is greedy: always the likeliest token."""

    temperature: float = 0.0
    top_k: int | None = None
    """Only the k likeliest tokens may be chosen."""
    top_p: float | None = None
    """Only the likeliest tokens that together hold this much probability may be chosen."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature and not LEAST <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature = {self.temperature} must be 0 or at least {LEAST}. 0 is greedy, 1 "
                "samples the model's own distribution."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k = {self.top_k} must be at least 1.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p} must lie in (0, 1].")


def choose(
    logits: Float[Tensor, "B V"], sampling: Sampling, generator: torch.Generator
) -> Int[Tensor, "B"]:
    """One token per sequence, by `sampling`'s rule; a tie goes to the lowest id when greedy."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    scores = logits.float() / sampling.temperature
    if sampling.top_k is not None:
        least = scores.topk(min(sampling.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p is not None:
        scores = scores.masked_fill(_outside_nucleus(scores, sampling.top_p), -torch.inf)
    return torch.multinomial(scores.softmax(dim=-1), 1, generator=generator).squeeze(-1)


def _outside_nucleus(scores: Tensor, top_p: float) -> Tensor:
    """True for tokens outside the smallest set of likeliest ones that holds `top_p`."""
    ordered, order = scores.softmax(dim=-1).sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, before >= top_p)
