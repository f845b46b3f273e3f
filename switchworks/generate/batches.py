"""Tokens for many inputs, in batches of similar length, so that little of them is padding.

`generate` writes one batch, with everything that makes decoding faster or better: kernels, a
compiled step, beams, ranks. The loop itself is `switchworks.model.decode`.

Letters: B sequences, L input or prompt length, T tokens written.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from switchworks.batch import check_prompts
from switchworks.config import ConfigError, check_at_least
from switchworks.fast import CompiledDecoder, for_decoding, require_compiler
from switchworks.generate.beam import BeamSearch, search
from switchworks.model import Sampling, SwitchTransformer, decode, evaluating
from switchworks.parallel import SINGLE, Ranks


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How texts are written."""

    max_length: int = 128
    """Tokens written at most."""
    sampling: Sampling = Sampling()  # noqa: RUF009  it is frozen
    beams: BeamSearch = BeamSearch(beams=1)  # noqa: RUF009
    batch_size: int = 32
    """Texts of similar length that are decoded at once."""
    compile: bool = False
    """Compile the step of decoding, which takes a minute for a new model and batch size: for many
    texts, of which each token then takes two thirds of its time at batch size 1."""

    def __post_init__(self) -> None:
        check_at_least(self, "", 1, "max_length", "batch_size")


@torch.no_grad()
def generate(
    model: SwitchTransformer,
    inputs: Int[Tensor, "B L"],
    *,
    max_length: int = 128,
    sampling: Sampling | None = None,
    beams: BeamSearch | None = None,
    compiled: CompiledDecoder | None = None,
    ranks: Ranks = SINGLE,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "B T"]:
    """The tokens `model` writes for `inputs`, each row ended by EOS and then padded with 0.

    Greedily, or by `sampling` or `beams`; random numbers come from `generator`, or else from the
    sampling's seed anew at every call. The inputs of a decoder-only model are prompts without EOS,
    padded on either side, and the tokens are what follows them. T is the length of the longest row
    and at most `max_length`; a row that has not ended by then has no EOS. The model's training mode
    is restored afterwards.

    `compiled` is the compiled step of this model: faster from the second call on. Of a model that
    is spread over several `ranks`, all of them call this together, each with its rows, and T is the
    same for all; not with `beams`.
    """
    if compiled is not None and not compiled.matches(model):
        raise ConfigError(
            "The compiled step is of another model, or was made before this one was changed.\n"
            "  Make a CompiledDecoder of this model as it is now."
        )
    sampling = sampling or Sampling()
    check_prompts(inputs, max_length, model.config.decoder_only)
    with evaluating(model), for_decoding(model):
        if beams is not None and beams.beams > 1:
            _check_beams(beams, sampling, ranks)
            return search(model, inputs, max_length, beams, compiled)
        return decode(
            model,
            inputs,
            max_length,
            sampling,
            generator=generator,
            make_step=None if compiled is None else compiled.start,
            goes_on=lambda ended: bool(ranks.all_max(int(not ended.all()))),
        )


def _check_beams(beams: BeamSearch, sampling: Sampling, ranks: Ranks) -> None:
    if sampling.temperature:
        raise ConfigError(
            f"temperature = {sampling.temperature} samples, and beams = {beams.beams} look for "
            "the likeliest text.\n  Choose one of them."
        )
    if ranks.mesh is not None:
        raise ConfigError("beams are for a model on one rank. Leave them out, or load it there.")


def generate_all(
    model: SwitchTransformer,
    inputs: Sequence[Sequence[int]],
    config: GenerationConfig,
    ranks: Ranks = SINGLE,
) -> list[list[int]]:
    """The tokens written for each of `inputs`, in their order, padded as in their batch.

    Of `ranks` that hold parts of the model, all call this together with the same inputs: each
    writes a share of them and returns all. One generator draws for all batches of a rank.
    """
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(config.sampling.seed)
    size = max(1, min(config.batch_size, -(-len(inputs) // ranks.batch_world)))
    compiled = _compile(model, size) if config.compile else None
    share: dict[int, list[int]] = {}
    for places in _batches_of_rank([len(ids) for ids in inputs], size, ranks):
        batch = pad([inputs[place] for place in places])
        batch = F.pad(batch, (0, ranks.all_max(batch.shape[1]) - batch.shape[1]))
        tokens = generate(
            model,
            batch.to(device),
            max_length=config.max_length,
            sampling=config.sampling,
            beams=config.beams,
            # A last, smaller batch would be compiled for by itself.
            compiled=compiled if len(places) == size else None,
            ranks=ranks,
            generator=generator,
        )
        share |= zip(places, tokens.tolist(), strict=True)
    written = {place: ids for part in ranks.all_gather(share) for place, ids in part.items()}
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
