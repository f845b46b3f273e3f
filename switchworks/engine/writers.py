"""Choosing the next tokens of one request from the model's logits.

Letters: B rows of all requests, N texts of this one, V vocabulary, T tokens written, L input
length.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from switchworks.data import Tokenizer
from switchworks.engine.requests import Request
from switchworks.generate import BeamState, BoundConstraints, bind
from switchworks.model import EOS, PAD, SwitchTransformer, choose


class Scores:
    """The logits of a step. What most requests want of them is computed for all rows at once."""

    def __init__(self, logits: Float[Tensor, "B V"]) -> None:
        self.logits = logits

    @cached_property
    def best(self) -> list[int]:
        """The likeliest token of each row; a tie goes to the lowest id."""
        return self.logits.argmax(dim=-1).tolist()

    @cached_property
    def best_log_probs(self) -> list[float]:
        """ln p of those."""
        return self.log_probs(range(len(self.logits)), self.best)

    @cached_property
    def _normaliser(self) -> Float[Tensor, "B"]:
        return self.logits.float().logsumexp(dim=-1)

    def log_probs(self, rows: Sequence[int], ids: Sequence[int]) -> list[float]:
        """ln p of a token in each of `rows`."""
        places = list(rows)
        return (self.logits[places, list(ids)] - self._normaliser[places]).tolist()


class Move(NamedTuple):
    """What one token more has brought."""

    tokens: list[int]
    """The next token of each of the N texts, PAD of those that had ended; of beams that are over
    none."""
    log_probs: list[float]
    """ln p of each. Of beams, which go back to earlier ones, none."""
    parents: list[int] | None
    """Of beams: which text each one extends."""
    is_over: bool


@runtime_checkable
class Writer(Protocol):
    """The texts of one request."""

    def advance(self, scores: Scores, rows: Sequence[int]) -> Move:
        """Chooses the next tokens, of the texts in `rows`."""
        ...

    def texts(self) -> "list[Written]":
        """The texts so far, without padding."""
        ...


class Written(NamedTuple):
    """A text as tokens."""

    ids: list[int]
    has_ended: bool
    """By EOS or a stop text."""
    score: float | None
    """What beams are ranked by; None where it is ln p."""


def make_writer(model: SwitchTransformer, request: Request, tokenizer: Tokenizer | None) -> Writer:
    """The writer of `request`. Raises ConfigError for constraints that the model cannot keep."""
    config, device = request.config, model.embedding.weight.device
    inputs = torch.tensor([list(request.ids)], dtype=torch.long, device=device)
    beams = config.beams.beams > 1
    rows = inputs if beams else inputs.repeat_interleave(request.candidates, dim=0)
    rules = bind(config.constraints(tokenizer), model, rows, config.max_length)
    if beams:
        return Beams(BeamState(inputs, config.max_length, config.beams, rules), request.candidates)
    if rules is None and config.sampling.temperature == 0:
        return Greedy(config.max_length)
    return Samples(request, rows, rules)


class Greedy:
    """One text of the likeliest tokens: `generate` as it is by default."""

    def __init__(self, max_length: int) -> None:
        self.max_length, self.ids = max_length, list[int]()

    def advance(self, scores: Scores, rows: Sequence[int]) -> Move:
        """Takes the likeliest token."""
        (row,) = rows
        self.ids.append(token := scores.best[row])
        is_over = token == EOS or len(self.ids) == self.max_length
        return Move([token], [scores.best_log_probs[row]], None, is_over)

    def texts(self) -> list[Written]:
        """The text so far."""
        return [Written(_without_padding(self.ids), EOS in self.ids[-1:], None)]


class Samples:
    """Texts that are sampled, or one that keeps to constraints: `generate` without beams."""

    def __init__(
        self, request: Request, inputs: Int[Tensor, "N L"], rules: BoundConstraints | None
    ) -> None:
        self.sampling, self.max_length = request.config.sampling, request.config.max_length
        self.rules = rules
        self.draws = torch.Generator(inputs.device).manual_seed(self.sampling.seed)
        self.columns = inputs[:, :0]
        self.ended = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)

    def advance(self, scores: Scores, rows: Sequence[int]) -> Move:
        """Chooses the next tokens."""
        logits = scores.logits[list(rows)]
        if self.rules is not None:
            logits = self.rules.process(logits, self.columns)
        tokens = choose(logits, self.sampling, self.draws).masked_fill(self.ended, PAD)
        self.columns = torch.cat([self.columns, tokens[:, None]], dim=1)
        over = tokens == EOS if self.rules is None else self.rules.ended(self.columns)
        self.ended = self.ended | over
        at_end = self.columns.shape[1] == self.max_length
        ids, is_over = tokens.tolist(), at_end or bool(self.ended.all())
        return Move(ids, scores.log_probs(rows, ids), None, is_over)

    def texts(self) -> list[Written]:
        """The texts so far, without padding."""
        rows = zip(self.columns.tolist(), self.ended.tolist(), strict=True)
        return [Written(_without_padding(ids), ended, None) for ids, ended in rows]


class Beams:
    """The beams of one input: `generate` with beams."""

    def __init__(self, state: BeamState, candidates: int) -> None:
        self.state, self.candidates = state, candidates

    def advance(self, scores: Scores, rows: Sequence[int]) -> Move:
        """Chooses the next tokens, and the beams that go on."""
        extended = self.state.advance(scores.logits[list(rows)])
        if extended is None:
            return Move([], [], None, True)
        tokens, parents = extended
        return Move(tokens.tolist(), [], parents.flatten().tolist(), False)

    def texts(self) -> list[Written]:
        """The best texts that have ended."""
        tokens, scores = self.state.best(self.candidates)
        pairs = zip(map(_without_padding, tokens.tolist()), scores.tolist(), strict=True)
        return [Written(ids, EOS in ids[-1:], score) for ids, score in pairs]


def _without_padding(ids: list[int]) -> list[int]:
    end = len(ids)
    while end and ids[end - 1] == PAD:
        end -= 1
    return ids[:end]
