"""What may be written: the logits of the next token, given the tokens before it.

The rules are those of transformers' logits processors, in their order, and see the same tokens: a
decoder-only model's prompt counts, and of an encoder-decoder the id 0 that decoding starts from.

Letters: B rows, H tokens so far, V vocabulary, S sequences of M tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from switchworks.batch import align_right
from switchworks.config import ConfigError, check_at_least, check_positive
from switchworks.data import Tokenizer
from switchworks.model import EOS, SwitchTransformer


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What bounds a text whatever its tokens are."""

    min_length: int = 0
    """Tokens written at least before EOS."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that are there already, and multiplies the negative."""
    no_repeat_ngram: int = 0
    """No sequence of this many tokens comes twice. 0: any may."""

    def __post_init__(self) -> None:
        check_at_least(self, "", 0, "min_length", "no_repeat_ngram")
        check_positive(self, "", "repetition_penalty")


@dataclass(frozen=True, kw_only=True)
class Constraints(Limits):
    """The limits, and which tokens may be written."""

    prefix: tuple[int, ...] = ()
    """The first tokens that are written. Beams score what follows them."""
    forbid: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that are not written."""
    allow: tuple[int, ...] = ()
    """The only tokens that are written, EOS too only if it is among them. Empty: all."""
    ends: Callable[[Sequence[int]], bool] | None = None
    """Whether a text ends with the last of these tokens, beside EOS (`StopTexts`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if () in self.forbid or (EOS,) in self.forbid:
            raise ConfigError(
                f"forbid = {self.forbid} must hold sequences of tokens other than EOS ({EOS}) "
                "alone.\n  To keep texts from ending, set min_length."
            )
        if EOS in self.prefix:
            raise ConfigError(
                f"prefix = {self.prefix} holds EOS ({EOS}), which ends a text.\n  Leave it out."
            )

    def check(self, vocab_size: int, max_length: int) -> None:
        """Raises ConfigError for tokens that are not in the vocabulary, or no room after them."""
        ids = {*self.prefix, *self.allow, *(id_ for ids in self.forbid for id_ in ids)}
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise ConfigError(
                f"Token {max(ids, key=abs)} of prefix, forbid or allow is not in the vocabulary.\n"
                f"  Use ids from 0 to {vocab_size - 1}."
            )
        if max(len(self.prefix), self.min_length) >= max_length:
            raise ConfigError(
                f"max_length = {max_length} leaves no room after prefix ({len(self.prefix)} "
                f"tokens) or min_length = {self.min_length}.\n  Raise max_length."
            )

    def process(
        self, scores: Float[Tensor, "B V"], tokens: Int[Tensor, "B H"], written: int, beams: int = 1
    ) -> Float[Tensor, "B V"]:
        """`scores`, logits or log-probabilities, with -inf for what may not follow `tokens`.

        The last `written` of `tokens` are the model's; id -1 is padding. `beams` rows in turn are
        the beams of one text.
        """
        scores, size = scores.float(), scores.shape[1]
        if written < len(self.prefix):
            return _forced(scores, self.prefix[written : written + 1])
        if self.repetition_penalty != 1:
            scores = _penalised(scores, tokens, self.repetition_penalty)
        if 0 < self.no_repeat_ngram <= tokens.shape[1]:
            ngrams = tokens.unfold(1, self.no_repeat_ngram, 1)
            scores = scores.masked_fill(_completed(tokens, ngrams, size), -math.inf)
        for length in {len(ids) for ids in self.forbid if len(ids) <= tokens.shape[1] + 1}:
            group = tokens.new_tensor([[ids for ids in self.forbid if len(ids) == length]])
            scores = scores.masked_fill(_completed(tokens, group, size), -math.inf)
        if written < self.min_length:
            scores = scores.index_fill(1, tokens.new_tensor([EOS]), -math.inf)
        return _within(scores, self.allow, beams) if self.allow else scores


@dataclass(frozen=True)
class BoundConstraints:
    """Constraints on what follows `start`, the tokens before the first that is written. Each row of
    it may have several of texts, its beams, one after another."""

    constraints: Constraints
    start: Int[Tensor, "B L"]

    def process(
        self, scores: Float[Tensor, "R V"], written: Int[Tensor, "R T"]
    ) -> Float[Tensor, "R V"]:
        """`Constraints.process` after the tokens `written`."""
        beams = len(written) // len(self.start)
        return self.constraints.process(scores, self._texts(written), written.shape[1], beams)

    def ended(self, written: Int[Tensor, "R T"]) -> Bool[Tensor, "R"]:
        """Which rows end with the last token `written`. A forced prefix ends nothing."""
        over, ends = written[:, -1] == EOS, self.constraints.ends
        if ends is None or written.shape[1] <= len(self.constraints.prefix):
            return over
        texts = self._texts(written).tolist()
        return over | over.new_tensor([ends([id_ for id_ in row if id_ >= 0]) for row in texts])

    def _texts(self, written: Int[Tensor, "R T"]) -> Int[Tensor, "R H"]:
        start = self.start.repeat_interleave(len(written) // len(self.start), dim=0)
        return torch.cat([start, written], dim=1)


def bind(
    constraints: Constraints | None,
    model: SwitchTransformer,
    inputs: Int[Tensor, "B L"],
    max_length: int,
) -> BoundConstraints | None:
    """The constraints after `inputs`; None if there are none. Raises ConfigError as `check`."""
    if constraints is None or constraints == Constraints():
        return None
    constraints.check(model.config.vocab_size, max_length)
    if not model.config.decoder_only:
        return BoundConstraints(constraints, torch.zeros_like(inputs[:, :1]))
    prompts = align_right(inputs)
    return BoundConstraints(constraints, prompts.masked_fill((prompts != 0).cumsum(dim=1) == 0, -1))


def _penalised(
    scores: Float[Tensor, "B V"], tokens: Int[Tensor, "B H"], penalty: float
) -> Float[Tensor, "B V"]:
    seen = _marked(tokens, scores.shape[1])
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def _completed(
    tokens: Int[Tensor, "B H"], sequences: Int[Tensor, "#B S M"], size: int
) -> Bool[Tensor, "B V"]:
    """The tokens that would complete one of `sequences`."""
    tail = tokens[:, tokens.shape[1] + 1 - sequences.shape[2] :]
    matches = (sequences[..., :-1] == tail[:, None]).all(dim=-1)
    return _marked(sequences[..., -1].where(matches, -1), size)


def _marked(tokens: Int[Tensor, "B S"], size: int) -> Bool[Tensor, "B V"]:
    """Which ids are among `tokens`; -1 is none and goes to a spare column."""
    marks = tokens.new_zeros(tokens.shape[0], size + 1, dtype=torch.bool)
    return marks.scatter(1, tokens.where(tokens >= 0, size), True)[:, :size]


def _forced(scores: Float[Tensor, "B V"], ids: Sequence[int]) -> Float[Tensor, "B V"]:
    """0 for `ids`, whatever their scores were, and -inf for all others."""
    places = torch.tensor(ids, device=scores.device)
    return torch.full_like(scores, -math.inf).index_fill(1, places, 0.0)


def _within(scores: Float[Tensor, "B V"], ids: Sequence[int], beams: int) -> Float[Tensor, "B V"]:
    """-inf for all but `ids`; where the other rules forbid all of these in every beam, they win."""
    forced = _forced(scores, ids)
    allowed = scores + forced
    none_left = allowed.isneginf().all(dim=-1).view(-1, beams).all(dim=-1)
    return torch.where(none_left.repeat_interleave(beams)[:, None], forced, allowed)


@dataclass(frozen=True)
class StopTexts:
    """Whether the last token completes one of `texts`, which then ends what is written."""

    tokenizer: Tokenizer
    texts: tuple[str, ...]

    def __call__(self, ids: Sequence[int]) -> bool:
        """`ids` are all tokens so far."""
        longest = max(len(text.encode()) for text in self.texts)  # a token is a byte at least
        tail = ids[-longest - 1 :]
        added = len(continuation(self.tokenizer, tail[:-1], tail[-1:]))
        end = self.tokenizer.decode(tail)
        starts = ((text, len(end) - added - len(text) + 1) for text in self.texts)
        return any(end.find(text, max(0, start)) >= 0 for text, start in starts)


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], written: Sequence[int]) -> str:
    """The text that `written` adds to the text of `prompt`, the space between them included.
    Decoded together, because alone the first token of `written` would lose its space and half a
    character would not be one."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *written])
    same = takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
    return whole[sum(1 for _ in same) :]
