"""Beam search: several hypotheses for each sequence are extended at once.

A hypothesis that ends with EOS, or at `max_length`, is scored, the sum of its log-probabilities
divided by its length penalty, and kept if it is among the N best finished ones. A sequence is done
when it has N of them and the likeliest open one, at its present length, scores no better than the
worst: transformers' `early_stopping=False`. It then stays as it is, so its result does not depend
on its neighbours in the batch.

Letters: B sequences, N beams, C candidates (2 N), T tokens written, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from switchworks.config import ConfigError, check_literals
from switchworks.fast import CompiledDecoder
from switchworks.generate.constraints import BoundConstraints
from switchworks.model import EOS, PAD, DecoderCache, KeyValues, SwitchTransformer, first_logits

NEVER = -1e9
"""The score of what may not be chosen. Finite, so that sums of it are no NaN."""

MAX_PENALTY = 10


@dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """How many beams, and how texts of different lengths compare."""

    beams: int = 4
    """Hypotheses that are extended at once. 1 is greedy."""
    length_penalty: float = 1.0
    """The power of the length by which log-probabilities are divided: 0 compares sums, which
    favours short texts, 1 means. T5 (WMT, CNN/DM) used 0.6, with its own `penalty`."""
    penalty: Literal["length", "t5"] = "length"
    """"length": tokens with EOS, as in transformers. "t5": (5 + tokens) / 6, as in Mesh TensorFlow
    and GNMT."""

    def __post_init__(self) -> None:
        check_literals(self, "")
        if self.beams < 1:
            raise ConfigError(f"beams = {self.beams} must be at least 1.\n  1 is greedy.")
        if not abs(self.length_penalty) <= MAX_PENALTY:
            raise ConfigError(
                f"length_penalty = {self.length_penalty} must lie between -{MAX_PENALTY} and "
                f"{MAX_PENALTY}. T5 used 0.6."
            )

    def divisor(self, length: int) -> float:
        """The divisor of the log-probability of a text of `length` tokens."""
        base = length if self.penalty == "length" else (5 + length) / 6
        return base**self.length_penalty


@dataclass
class _Hypotheses:
    """Texts with their scores, likeliest first."""

    tokens: Int[Tensor, "B N T"]
    scores: Float[Tensor, "B N"]

    def best(self, count: int) -> tuple["_Hypotheses", Int[Tensor, "B count"]]:
        """The `count` best, and their places."""
        scores, places = self.scores.topk(count)
        return _Hypotheses(_take(self.tokens, places), scores), places


def search(
    model: SwitchTransformer,
    inputs: Int[Tensor, "B L"],
    max_length: int,
    config: BeamSearch,
    compiled: CompiledDecoder | None = None,
    rules: BoundConstraints | None = None,
    candidates: int = 1,
) -> tuple[Int[Tensor, "BC T"], Float[Tensor, "BC"]]:
    """The best C `candidates` for each of `inputs`, ended by EOS and padded with id 0, and their
    scores; `model` is in evaluation mode."""
    logits, cache = first_logits(model, inputs, max_length)
    cache = _repeat(cache, config.beams)
    step = partial(model.decode_step, cache=cache) if compiled is None else compiled.start(cache)
    state = BeamState(inputs, max_length, config, rules)
    logits = logits.repeat_interleave(config.beams, dim=0)
    while (extended := state.advance(logits[:, -1])) is not None:
        tokens, parents = extended
        _reorder(cache, parents)
        logits = step(tokens[:, None])
    return state.best(candidates)


class BeamState:
    """The beams of each of B sequences, from one token to the next."""

    def __init__(
        self,
        inputs: Int[Tensor, "B L"],
        max_length: int,
        config: BeamSearch,
        rules: BoundConstraints | None = None,
    ) -> None:
        """Before the first token. `inputs` say how many sequences there are, and where."""
        self.config, self.rules, self.max_length, self.written = config, rules, max_length, 0
        empty = inputs.new_zeros(inputs.shape[0], config.beams, max_length)
        # All beams start equal: only the first counts, or all would be extended in the same way.
        scores = torch.full(empty.shape[:2], NEVER, device=inputs.device)
        scores[:, 0] = 0.0
        self.open = _Hypotheses(empty, scores)
        self.ended = _Hypotheses(empty, torch.full_like(scores, NEVER))
        self.done = torch.zeros(inputs.shape[0], dtype=torch.bool, device=inputs.device)

    def advance(
        self, logits: Float[Tensor, "BN V"]
    ) -> tuple[Int[Tensor, "BN"], Int[Tensor, "B N"]] | None:
        """The next token of every beam, and the beam it extends; None once all is found."""
        extended, parents = _extend(self.open, logits.float(), self.written, self.rules)
        last, self.written = self.written, self.written + 1
        texts, at_end = extended.tokens[:, :, : self.written], self.written == self.max_length
        rules, flat = self.rules, texts.flatten(0, 1)
        over = flat[:, -1] == EOS if rules is None else rules.ended(flat)
        over = over.view(texts.shape[:2]) | at_end
        forced = 0 if rules is None else len(rules.constraints.prefix)
        length = max(1, self.written - forced)
        self.ended = _merge(self.ended, extended, over, self.done, length, self.config)
        unended = _Hypotheses(extended.tokens, extended.scores.masked_fill(over, NEVER))
        self.open, places = unended.best(self.config.beams)
        self.done = self.done | _is_done(self.open, self.ended, length, self.config)
        if at_end or self.done.all():
            return None
        return self.open.tokens[:, :, last].flatten(), parents.gather(1, places)

    def best(self, candidates: int) -> tuple[Int[Tensor, "BC T"], Float[Tensor, "BC"]]:
        """The `candidates` best texts of each sequence, and their scores."""
        tokens = self.ended.tokens[:, :candidates].flatten(0, 1)
        used = (tokens != PAD).any(dim=0).nonzero()
        tokens = tokens[:, : int(used.max()) + 1 if len(used) else 1]
        return tokens, self.ended.scores[:, :candidates].flatten()


def _extend(
    open_: _Hypotheses, logits: Float[Tensor, "BN V"], written: int, rules: BoundConstraints | None
) -> tuple[_Hypotheses, Int[Tensor, "B C"]]:
    """The 2 N likeliest extensions by a token, and the beams they extend. 2 N, because N of them
    may end with this token and N have to stay open."""
    rows, beams = open_.scores.shape
    logits = logits.log_softmax(dim=-1)
    if rules is not None:
        logits = rules.process(logits, open_.tokens[:, :, :written].flatten(0, 1))
    scores = logits.view(rows, beams, -1) + open_.scores[..., None]
    best, places = scores.flatten(1).topk(2 * beams)
    parents, tokens = places // scores.shape[2], places % scores.shape[2]
    texts = _take(open_.tokens, parents)
    texts[:, :, written] = tokens
    return _Hypotheses(texts, best), parents


def _merge(
    ended: _Hypotheses,
    candidates: _Hypotheses,
    over: Bool[Tensor, "B C"],
    done: Bool[Tensor, "B"],
    length: int,
    config: BeamSearch,
) -> _Hypotheses:
    """The best N of the finished ones and of those of the best N candidates that just ended."""
    scores = (candidates.scores / config.divisor(length)).masked_fill(~over, NEVER)
    scores[:, config.beams :] = NEVER
    scores = scores.masked_fill(done[:, None], NEVER)
    both = _Hypotheses(
        torch.cat([ended.tokens, candidates.tokens], dim=1),
        torch.cat([ended.scores, scores], dim=1),
    )
    return both.best(config.beams)[0]


def _is_done(
    open_: _Hypotheses, ended: _Hypotheses, length: int, config: BeamSearch
) -> Bool[Tensor, "B"]:
    worst = ended.scores[:, -1]
    return (worst > NEVER / 2) & (open_.scores[:, 0] / config.divisor(length) <= worst)


def _take(texts: Int[Tensor, "B N T"], places: Int[Tensor, "B M"]) -> Int[Tensor, "B M T"]:
    return texts.gather(1, places[..., None].expand(-1, -1, texts.shape[2]))


def _repeat(cache: DecoderCache, beams: int) -> DecoderCache:
    """The cache of B sequences as that of B N beams."""

    def each(part: Tensor) -> Tensor:
        return part.repeat_interleave(beams, dim=0)

    for layer in cache.layers:
        layer.k, layer.v = each(layer.k), each(layer.v)
        layer.memory = layer.memory and KeyValues(each(layer.memory.k), each(layer.memory.v))
    masks = (cache.memory_bias, cache.prompt_bias)
    return DecoderCache(
        cache.layers, cache.last_bias, *(None if mask is None else each(mask) for mask in masks)
    )


def _reorder(cache: DecoderCache, parents: Int[Tensor, "B N"]) -> None:
    """Each beam gets its parent's keys and values. What the beams of a sequence share stays."""
    rows, beams = parents.shape
    if (parents == torch.arange(beams, device=parents.device)).all():
        return
    first = torch.arange(rows, device=parents.device)[:, None] * beams
    places = (first + parents).flatten()
    for layer in cache.layers:
        layer.k[:, :, : layer.length] = layer.k[places, :, : layer.length]
        layer.v[:, :, : layer.length] = layer.v[places, :, : layer.length]
