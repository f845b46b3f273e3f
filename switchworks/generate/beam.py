"""Beam search: several likely beginnings of each answer are followed at once.

At each step every beam is continued by every token, and of all these the likeliest stay. One that
is ended by EOS is scored, the sum of its log-probabilities divided by its `penalty`, and kept if it
is among the best so many ended ones. Texts that are still open at `max_length` count as ended.

A sequence is done when it has as many ended texts as beams and the likeliest open one, at the
length it has now, scores no better than the worst of them: transformers' `early_stopping=False`.
With `early_stopping` it is done as soon as it has that many. A done sequence stays as it is, so its
answer does not depend on its neighbours in the batch.

Letters: B sequences, N beams, C candidates (2 N), T tokens written, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from switchworks.config import ConfigError
from switchworks.fast import CompiledDecoder
from switchworks.generate.start import EOS, PAD, start, steps
from switchworks.model import DecoderCache, KeyValues, SwitchTransformer

NEVER = -1e9
"""The score of what may not be chosen. Finite, so that sums of it are no NaN."""


MOST = 10
"""The greatest power of the length."""


@dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """How many beams, and how texts of different lengths compare."""

    beams: int = 4
    """Beginnings that are followed at once. 1 is greedy."""
    length_penalty: float = 1.0
    """The power of the length by which log-probabilities are divided: 0 compares sums, which
    favours short texts, 1 means. T5 (WMT, CNN/DM) used 0.6, with its own `penalty`."""
    penalty: Literal["length", "t5"] = "length"
    """"length": tokens with EOS, as in transformers. "t5": (5 + tokens) / 6, as in Mesh TensorFlow,
    which has it from GNMT."""
    early_stopping: bool = False
    """Done with as many ended texts as beams, whatever the open ones might still become."""

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise ConfigError(f"beams = {self.beams} must be at least 1, which is greedy.")
        if not abs(self.length_penalty) <= MOST:
            raise ConfigError(
                f"length_penalty = {self.length_penalty} must lie between -{MOST} and {MOST}. T5 "
                "used 0.6."
            )

    def divisor(self, length: int) -> float:
        """What the log-probability of a text of `length` tokens is divided by."""
        base = length if self.penalty == "length" else (5 + length) / 6
        return base**self.length_penalty


@dataclass
class _Texts:
    """Texts with their scores, likeliest first."""

    tokens: Int[Tensor, "B N T"]
    scores: Float[Tensor, "B N"]

    def best(self, count: int) -> tuple["_Texts", Int[Tensor, "B count"]]:
        """The `count` best, and which they were."""
        scores, places = self.scores.topk(count)
        return _Texts(_taken(self.tokens, places), scores), places


def search(
    model: SwitchTransformer,
    inputs: Int[Tensor, "B L"],
    max_length: int,
    how: BeamSearch,
    graph: CompiledDecoder | None = None,
) -> Int[Tensor, "B T"]:
    """The best text found for each of `inputs`, ended by EOS and padded with id 0."""
    logits, cache = start(model, inputs, max_length)
    rows, beams = inputs.shape[0], how.beams
    cache = _repeated(cache, beams)
    step = steps(model, cache, graph)
    logits = logits.repeat_interleave(beams, dim=0)
    nothing = inputs.new_zeros(rows, beams, max_length)
    # All beams begin alike: only the first counts, or all would go the same way.
    apart = torch.full((rows, beams), NEVER, device=inputs.device)
    apart[:, 0] = 0.0
    open_, ended = _Texts(nothing, apart), _Texts(nothing, torch.full_like(apart, NEVER))
    done = torch.zeros(rows, dtype=torch.bool, device=inputs.device)
    for written in range(max_length):
        candidates, parents = _continued(open_, logits[:, -1].float(), written)
        over = (candidates.tokens[:, :, written] == EOS) | (written + 1 == max_length)
        ended = _with_new(ended, candidates, over, done, written + 1, how)
        open_, places = _Texts(candidates.tokens, candidates.scores.masked_fill(over, NEVER)).best(
            beams
        )
        done = done | _is_done(open_, ended, written + 1, how)
        if done.all() or written + 1 == max_length:
            break
        _reorder(cache, parents.gather(1, places))
        logits = step(open_.tokens[:, :, written].reshape(-1, 1))
    best = ended.tokens[:, 0]
    used = (best != PAD).any(dim=0).nonzero()
    return best[:, : int(used.max()) + 1 if len(used) else 1]


def _continued(
    open_: _Texts, logits: Float[Tensor, "BN V"], written: int
) -> tuple[_Texts, Int[Tensor, "B C"]]:
    """The 2 N likeliest continuations by a token, and the beams they continue.

    As many as that, because N of them may be ended and N are to go on.
    """
    rows, beams = open_.scores.shape
    scores = logits.log_softmax(dim=-1).view(rows, beams, -1) + open_.scores[..., None]
    found, places = scores.flatten(1).topk(2 * beams)
    parents, tokens = places // scores.shape[2], places % scores.shape[2]
    texts = _taken(open_.tokens, parents)
    texts[:, :, written] = tokens
    return _Texts(texts, found), parents


def _with_new(
    ended: _Texts,
    candidates: _Texts,
    over: Bool[Tensor, "B C"],
    done: Bool[Tensor, "B"],
    length: int,
    how: BeamSearch,
) -> _Texts:
    """The best N of the ended texts and of those of the best N candidates that just ended."""
    scores = (candidates.scores / how.divisor(length)).masked_fill(~over, NEVER)
    scores[:, how.beams :] = NEVER
    scores = scores.masked_fill(done[:, None], NEVER)
    both = _Texts(
        torch.cat([ended.tokens, candidates.tokens], dim=1),
        torch.cat([ended.scores, scores], dim=1),
    )
    return both.best(how.beams)[0]


def _is_done(open_: _Texts, ended: _Texts, length: int, how: BeamSearch) -> Bool[Tensor, "B"]:
    worst = ended.scores[:, -1]
    enough = worst > NEVER / 2
    if how.early_stopping:
        return enough
    return enough & (open_.scores[:, 0] / how.divisor(length) <= worst)


def _taken(texts: Int[Tensor, "B N T"], places: Int[Tensor, "B M"]) -> Int[Tensor, "B M T"]:
    return texts.gather(1, places[..., None].expand(-1, -1, texts.shape[2]))


def _repeated(cache: DecoderCache, beams: int) -> DecoderCache:
    """The cache of B sequences as that of B N: every beam has seen what its sequence has."""

    def each(part: Tensor) -> Tensor:
        return part.repeat_interleave(beams, dim=0)

    for layer in cache.layers:
        layer.k, layer.v = each(layer.k), each(layer.v)
        layer.memory = layer.memory and KeyValues(each(layer.memory.k), each(layer.memory.v))
    hidden = (cache.memory_bias, cache.prompt_bias)
    return DecoderCache(
        cache.layers, cache.last_bias, *(None if bias is None else each(bias) for bias in hidden)
    )


def _reorder(cache: DecoderCache, parents: Int[Tensor, "B N"]) -> None:
    """Each beam goes on with what its parent has seen. What beams of a sequence share stays."""
    rows, beams = parents.shape
    if (parents == torch.arange(beams, device=parents.device)).all():
        return
    first = torch.arange(rows, device=parents.device)[:, None] * beams
    places = (first + parents).flatten()
    for layer in cache.layers:
        layer.k[:, :, : layer.length] = layer.k[places, :, : layer.length]
        layer.v[:, :, : layer.length] = layer.v[places, :, : layer.length]
