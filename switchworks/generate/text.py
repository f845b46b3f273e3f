"""From text to text: what `switchworks generate` prints."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from switchworks.checkpoint import load
from switchworks.config import CheckpointError, ConfigError, check_at_least
from switchworks.data import Tokenizer
from switchworks.device import compute_device
from switchworks.fast import CompiledDecoder, require_compiler
from switchworks.generate.batches import batches_by_length, pad
from switchworks.generate.beam import BeamSearch
from switchworks.generate.continue_text import continuation
from switchworks.generate.decode import generate
from switchworks.generate.fill_in import HOLE, fill, parse_fills
from switchworks.model import EOS, Sampling, SwitchTransformer
from switchworks.quantise import quantise


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How texts are written."""

    max_length: int = 128
    """Tokens written at most."""
    sampling: Sampling = field(default_factory=Sampling)
    beams: BeamSearch = field(default_factory=lambda: BeamSearch(beams=1))
    batch_size: int = 32
    """Texts written at once, those of similar length together."""
    compile: bool = False
    """The step of decoding is compiled first, see `CompiledDecoder`."""

    def __post_init__(self) -> None:
        check_at_least(self, "", 1, "max_length", "batch_size")


def complete(
    path: Path,
    texts: Sequence[str],
    config: GenerationConfig,
    *,
    int8: bool = False,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """`texts` with their holes filled by the model in `path`, fills in square brackets.

    A text without a hole gets one at its end, so it is continued. A decoder-only model only
    continues, and its text follows without brackets. `dtype` is what the model computes in, None:
    as it is stored. With `int8` the weights are quantised to 8 bits first. Raises CheckpointError
    if the model has no tokenizer, ConfigError if there is no text.
    """
    model, tokenizer = load(path, compute_device(), dtype)
    if tokenizer is None:
        raise CheckpointError(
            f"{path} holds a model without a tokenizer, so there is no way to read text.\n"
            "  Save it with one: switchworks.save(model, directory, tokenizer)."
        )
    if int8:
        model = quantise(model)
    write = continue_texts if model.config.decoder_only else fill_texts
    return write(model, tokenizer, texts, config)


def complete_file(
    path: Path,
    source: Path,
    config: GenerationConfig,
    output: Path | None = None,
    *,
    int8: bool = False,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """`complete` for every line of `source`; also written to `output`, if given, line by line.

    An empty line stays empty. Raises ConfigError if there is no text.
    """
    try:
        lines = _lines(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{source} cannot be read: {error}.\n  --file takes UTF-8 text, one text in each line."
        ) from error
    places = [place for place, line in enumerate(lines) if line.strip()]
    if not places:
        raise ConfigError(f"{source} holds no text.\n  --file takes one text in each line.")
    results = [""] * len(lines)
    texts = complete(path, [lines[place] for place in places], config, int8=int8, dtype=dtype)
    for place, text in zip(places, texts, strict=True):
        results[place] = " ".join(text.splitlines())
    if output is not None:
        output.write_text("".join(f"{text}\n" for text in results), encoding="utf-8")
    return results


def _lines(text: str) -> list[str]:
    """Lines ended by newlines alone; `splitlines` ends one at U+2028 too."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if not lines[-1] else lines


def fill_texts(
    model: SwitchTransformer, tokenizer: Tokenizer, texts: Sequence[str], config: GenerationConfig
) -> list[str]:
    """`texts` with every hole <extra_id_N> filled in square brackets; see `complete`."""
    if not all(text.strip() for text in texts):
        raise ConfigError('There is no text to fill in. Example: "The <extra_id_0> of the list."')
    texts = [text if HOLE.search(text) else f"{text.rstrip()} <extra_id_0>" for text in texts]
    written = _written(model, [[*tokenizer.encode(text), EOS] for text in texts], config)
    return [
        fill(text, parse_fills(tokenizer.decode(ids)))
        for text, ids in zip(texts, written, strict=True)
    ]


def continue_texts(
    model: SwitchTransformer, tokenizer: Tokenizer, texts: Sequence[str], config: GenerationConfig
) -> list[str]:
    """Each text and its continuation by a decoder-only model. An empty one starts a new text."""
    if any(HOLE.search(text) for text in texts):
        raise ConfigError(
            "This model is decoder-only: it continues a text and cannot fill holes inside it.\n"
            "  Give the text up to the first <extra_id_N>."
        )
    texts = [text.rstrip() for text in texts]
    prompts = [tokenizer.encode(text) for text in texts]
    written = _written(model, prompts, config)
    return [
        text + continuation(tokenizer, prompt, ids)
        for text, prompt, ids in zip(texts, prompts, written, strict=True)
    ]


def _compile(model: SwitchTransformer, texts: int) -> CompiledDecoder:
    """Compiled by the first batch, whose wait is announced."""
    require_compiler()
    print(
        f"compiling the step of decoding for {texts} at a time: about a minute, less if torch has "
        "it in its cache",
        file=sys.stderr,
    )
    return CompiledDecoder(model)


def _written(
    model: SwitchTransformer, inputs: Sequence[Sequence[int]], config: GenerationConfig
) -> list[list[int]]:
    """The tokens written for each of `inputs`, in their order."""
    written: list[list[int]] = [[] for _ in inputs]
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(config.sampling.seed)  # one for all batches
    most = min(config.batch_size, len(inputs))
    compiled = _compile(model, most) if config.compile else None
    for places in batches_by_length([len(ids) for ids in inputs], config.batch_size):
        batch = pad([torch.tensor(inputs[place], dtype=torch.long) for place in places])
        tokens = generate(
            model,
            batch.to(device),
            max_length=config.max_length,
            sampling=config.sampling,
            beams=config.beams,
            # A last, smaller batch would be compiled for by itself.
            compiled=compiled if len(places) == most else None,
            generator=generator,
        )
        for place, ids in zip(places, tokens.tolist(), strict=True):
            written[place] = ids
    return written
