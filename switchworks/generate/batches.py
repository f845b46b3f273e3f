"""Tokens for many inputs, in batches of similar length, so that little of them is padding.

`generate` writes one batch, with everything that makes decoding faster or better: kernels, a
compiled step, beams, ranks. The loop itself is `switchworks.model.decode_steps`.

Letters: B sequences, L input or prompt length, T tokens written.
"""

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from switchworks.batch import check_prompts
from switchworks.config import ConfigError, check_at_least
from switchworks.data import Tokenizer
from switchworks.fast import CompiledDecoder, for_decoding, require_compiler
from switchworks.generate.beam import BeamSearch, search
from switchworks.generate.constraints import Constraints, Limits, StopTexts, bind
from switchworks.model import (
    EOS,
    PAD,
    Sampling,
    SwitchTransformer,
    choose,
    decode_steps,
    evaluating,
    first_logits,
)
from switchworks.parallel import SINGLE, Ranks
from switchworks.progress import tracked

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(Limits):
    """How texts are written."""

    max_length: int = 128
    """Tokens written at most."""
    max_input: int = 4096
    """Tokens of a text; a longer one is refused, since attention needs memory with their square."""
    sampling: Sampling = field(default_factory=Sampling)
    """How the next token is chosen."""
    beams: BeamSearch = field(default_factory=lambda: BeamSearch(beams=1))
    """How many texts are followed at once."""
    prefix: str = ""
    """What every text begins with."""
    forbid: tuple[str, ...] = ()
    """Texts that are not written, as the tokens that each is on its own."""
    allow: tuple[str, ...] = ()
    """Only tokens of these texts are written, and EOS."""
    stop: tuple[str, ...] = ()
    """A text ends once it contains one of these."""
    batch_size: int = 32
    """Texts of similar length that are decoded at once."""
    compile: bool = False
    """Compile the step of decoding, which takes a minute for a new model and batch size: for many
    texts, of which each token then takes two thirds of its time at batch size 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, "", 1, "max_length", "max_input", "batch_size")
        for name in ("forbid", "allow", "stop"):
            if "" in getattr(self, name):
                raise ConfigError(f'{name} = {getattr(self, name)} holds "".\n  Give it a text.')

    def constraints(self, tokenizer: Tokenizer | None) -> Constraints:
        """The texts as tokens."""
        if tokenizer is None:
            texts = (self.prefix, self.forbid, self.allow, self.stop)
            assert not any(texts), "prefix, forbid, allow and stop need a tokenizer"
            return Constraints(**{each.name: getattr(self, each.name) for each in fields(Limits)})
        allowed = [id_ for text in self.allow for id_ in tokenizer.encode(text)]
        return Constraints(
            **{field.name: getattr(self, field.name) for field in fields(Limits)},
            prefix=tuple(tokenizer.encode(self.prefix)) if self.prefix else (),
            forbid=tuple(tuple(tokenizer.encode(text)) for text in self.forbid),
            allow=(EOS, *allowed) if allowed else (),
            ends=StopTexts(tokenizer, self.stop) if self.stop else None,
        )


class Scored(NamedTuple):
    """Texts and how likely they are, in float32."""

    tokens: Int[Tensor, "BN T"]
    scores: Float[Tensor, "BN"]
    """Of beams what they are ranked by, else ln p of the whole text."""
    log_probs: Float[Tensor, "BN T"]
    """ln p of each token by the model itself, whatever chose it; 0 for padding."""


class Candidate(NamedTuple):
    """One text that was written for an input; see `Scored`."""

    tokens: list[int]
    score: float
    log_probs: list[float]


@torch.no_grad()
def generate(
    model: SwitchTransformer,
    inputs: Int[Tensor, "B L"],
    *,
    max_length: int = 128,
    sampling: Sampling | None = None,
    beams: BeamSearch | None = None,
    constraints: Constraints | None = None,
    candidates: int = 1,
    compiled: CompiledDecoder | None = None,
    ranks: Ranks = SINGLE,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "BN T"]:
    """The tokens `model` writes for `inputs`, each row ended by EOS and then padded with 0.

    Greedily, or by `sampling` or `beams`; random numbers come from `generator`, or else from the
    sampling's seed anew at every call. The inputs of a decoder-only model are prompts without EOS,
    padded on either side, and the tokens are what follows them. T is the length of the longest row
    and at most `max_length`; a row that has not ended by then has no EOS. The model's training mode
    is restored afterwards.

    `constraints` say what may be written. Of each input there are N = `candidates` rows one after
    another: samples, or the best of the beams, the best first.

    `compiled` is the compiled step of this model: faster from the second call on. Of a model that
    is spread over several `ranks`, all of them call this together, each with its rows, and T is the
    same for all; not with `beams`.
    """
    settings: dict[str, Any] = {
        "max_length": max_length,
        "sampling": sampling,
        "constraints": constraints,
        "candidates": candidates,
        "compiled": compiled,
        "ranks": ranks,
        "generator": generator,
    }
    if beams is not None and beams.beams > 1:
        return _search(model, inputs, beams=beams, **settings)[0]
    return torch.stack([*stream(model, inputs, **settings)], dim=1)


def stream(
    model: SwitchTransformer,
    inputs: Int[Tensor, "B L"],
    *,
    max_length: int = 128,
    sampling: Sampling | None = None,
    constraints: Constraints | None = None,
    candidates: int = 1,
    compiled: CompiledDecoder | None = None,
    ranks: Ranks = SINGLE,
    generator: torch.Generator | None = None,
) -> Generator[Int[Tensor, "BN"], None, None]:
    """The columns of `generate` without beams, each as soon as it is written. Until the iterator
    ends or is closed, the model decodes and should do nothing else."""
    sampling = sampling or Sampling()
    if candidates < 1 or (candidates > 1 and not sampling.temperature):
        raise ConfigError(
            f"candidates = {candidates} must be 1 for greedy decoding, which writes one text.\n"
            "  Set a temperature, or beams."
        )
    _check(model, inputs, max_length, compiled)
    inputs = inputs.repeat_interleave(candidates, dim=0)
    draws = generator or torch.Generator(inputs.device).manual_seed(sampling.seed)
    rules, rest = bind(constraints, model, inputs, max_length), {}
    if rules is not None:
        rest["ends"] = lambda written: rules.ended(torch.stack(written, dim=1))

    def select(logits: Tensor, written: list[Tensor]) -> Tensor:
        if rules is not None:
            columns = torch.stack(written, dim=1) if written else inputs[:, :0]
            logits = rules.process(logits, columns)
        return choose(logits, sampling, draws)

    with for_decoding(model):
        yield from decode_steps(
            model,
            inputs,
            max_length,
            select,
            make_step=None if compiled is None else compiled.start,
            goes_on=lambda ended: bool(ranks.all_max(int(not ended.all()))),
            **rest,
        )


@torch.no_grad()
def generate_scored(
    model: SwitchTransformer, inputs: Int[Tensor, "B L"], **settings: Any
) -> Scored:
    """`generate`, whose settings it takes, and one more pass for how likely each token is."""
    beams, scores = settings.get("beams"), None
    if beams is not None and beams.beams > 1:
        tokens, scores = _search(model, inputs, **settings)
    else:
        tokens = generate(model, inputs, **settings)
    rows = inputs.repeat_interleave(tokens.shape[0] // inputs.shape[0], dim=0)
    log_probs = _log_probs(model, rows, tokens)
    return Scored(tokens, log_probs.sum(dim=1) if scores is None else scores, log_probs)


def _log_probs(
    model: SwitchTransformer, inputs: Int[Tensor, "B L"], tokens: Int[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    with evaluating(model), for_decoding(model):
        logits, cache = first_logits(model, inputs, tokens.shape[1])
        if tokens.shape[1] > 1:
            logits = torch.cat([logits, model.decode_step(tokens[:, :-1], cache)], dim=1)
    log_probs = logits.float().log_softmax(dim=-1).gather(-1, tokens[..., None]).squeeze(-1)
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    return log_probs.masked_fill(positions >= _lengths(tokens)[:, None], 0.0)


def _lengths(tokens: Int[Tensor, "B T"]) -> Int[Tensor, "B"]:
    """Tokens of each row without the padding behind them."""
    numbers = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    return numbers.where(tokens != PAD, 0).amax(dim=1)


def _search(
    model: SwitchTransformer,
    inputs: Int[Tensor, "B L"],
    *,
    beams: BeamSearch,
    max_length: int = 128,
    sampling: Sampling | None = None,
    constraints: Constraints | None = None,
    candidates: int = 1,
    compiled: CompiledDecoder | None = None,
    ranks: Ranks = SINGLE,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "BN T"], Float[Tensor, "BN"]]:
    """`generate` with beams, and the scores; `generator` is not used."""
    _check(model, inputs, max_length, compiled)
    _check_beams(beams, sampling or Sampling(), ranks, candidates)
    rules = bind(constraints, model, inputs, max_length)
    with evaluating(model), for_decoding(model):
        return search(model, inputs, max_length, beams, compiled, rules, candidates)


def _check(
    model: SwitchTransformer, inputs: Tensor, max_length: int, compiled: CompiledDecoder | None
) -> None:
    if compiled is not None and not compiled.matches(model):
        raise ConfigError(
            "The compiled step is of another model, or was made before this one was changed.\n"
            "  Make a CompiledDecoder of this model as it is now."
        )
    check_prompts(inputs, max_length, model.config.decoder_only)


def _check_beams(beams: BeamSearch, sampling: Sampling, ranks: Ranks, candidates: int) -> None:
    if sampling.temperature:
        raise ConfigError(
            f"temperature = {sampling.temperature} samples, and beams = {beams.beams} look for "
            "the likeliest text.\n  Choose one of them."
        )
    if ranks.mesh is not None:
        raise ConfigError("beams are for a model on one rank. Leave them out, or load it there.")
    if not 1 <= candidates <= beams.beams:
        raise ConfigError(
            f"candidates = {candidates} must lie between 1 and beams = {beams.beams}.\n"
            "  Raise beams, or sample with a temperature."
        )


def generate_all(
    model: SwitchTransformer,
    inputs: Sequence[Sequence[int]],
    config: GenerationConfig,
    ranks: Ranks = SINGLE,
    tokenizer: Tokenizer | None = None,
) -> list[list[int]]:
    """The tokens written for each of `inputs`, in their order, padded as in their batch.

    Of `ranks` that hold parts of the model, all call this together with the same inputs: each
    writes a share of them and returns all. One generator draws for all batches of a rank. The
    texts of `config` need the `tokenizer`.
    """

    def write(batch: Tensor, **settings: Any) -> list[list[int]]:
        return generate(model, batch, **settings).tolist()

    return _in_batches(model, inputs, config, ranks, tokenizer, write)


def generate_candidates(
    model: SwitchTransformer,
    inputs: Sequence[Sequence[int]],
    config: GenerationConfig,
    count: int,
    ranks: Ranks = SINGLE,
    tokenizer: Tokenizer | None = None,
) -> list[list[Candidate]]:
    """As `generate_all`, `count` candidates for each of `inputs`, the likeliest first."""

    def write(batch: Tensor, **settings: Any) -> list[list[Candidate]]:
        scored = generate_scored(model, batch, candidates=count, **settings)
        parts = (*scored, _lengths(scored.tokens))
        rows = zip(*(part.tolist() for part in parts), strict=True)
        texts = [Candidate(ids[:end], score, logs[:end]) for ids, score, logs, end in rows]
        groups = [texts[start : start + count] for start in range(0, len(texts), count)]
        return [sorted(group, key=lambda text: -text.score) for group in groups]

    return _in_batches(model, inputs, config, ranks, tokenizer, write)


def _in_batches(
    model: SwitchTransformer,
    inputs: Sequence[Sequence[int]],
    config: GenerationConfig,
    ranks: Ranks,
    tokenizer: Tokenizer | None,
    write: Callable[..., list[T]],
) -> list[T]:
    """What `write` makes of each of `inputs`, in their order; it gets batches, with settings."""
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(config.sampling.seed)
    size = max(1, min(config.batch_size, -(-len(inputs) // ranks.batch_world)))
    compiled = _compile(model, size) if config.compile else None
    constraints = config.constraints(tokenizer)
    share: dict[int, T] = {}
    batches = _batches_of_rank([len(ids) for ids in inputs], size, ranks)
    for places in tracked(batches, "generating", len(batches)):
        batch = pad([inputs[place] for place in places])
        batch = F.pad(batch, (0, ranks.all_max(batch.shape[1]) - batch.shape[1]))
        results = write(
            batch.to(device),
            max_length=config.max_length,
            sampling=config.sampling,
            beams=config.beams,
            constraints=constraints,
            # A last, smaller batch would be compiled for by itself.
            compiled=compiled if len(places) == size else None,
            ranks=ranks,
            generator=generator,
        )
        share |= zip(places, results, strict=True)
    written = {place: text for part in ranks.all_gather(share) for place, text in part.items()}
    return [written[place] for place in range(len(inputs))]


def _compile(model: SwitchTransformer, texts: int) -> CompiledDecoder:
    """Compiled by the first batch, whose wait is announced."""
    require_compiler()
    print(
        f"compiling the step of decoding for {texts} at a time: about a minute, less if torch has "
        "it in its cache",
        file=sys.stderr,
    )
    return CompiledDecoder(model)


def _batches_of_rank(lengths: Sequence[int], size: int, ranks: Ranks) -> list[list[int]]:
    """The batches that this rank generates, as places in `lengths`. Collectives inside the model
    need all ranks to call it equally often with equally many rows, so the last batch is filled up
    with its last row and the last batch is repeated."""
    batches = list(batches_by_length(lengths, size))
    if ranks.mesh is None or not batches:
        return batches
    batches[-1] += batches[-1][-1:] * (size - len(batches[-1]))
    rounds = -(-len(batches) // ranks.batch_world)
    numbers = [step * ranks.batch_world + ranks.batch_rank for step in range(rounds)]
    return [batches[min(number, len(batches) - 1)] for number in numbers]


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """The places of all sequences, the longest first, `batch_size` at a time."""
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def pad(rows: Sequence[Sequence[int]]) -> Int[Tensor, "B L"]:
    """The rows as one tensor, padded at their ends with id 0."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True)
