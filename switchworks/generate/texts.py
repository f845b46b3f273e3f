"""From text to text: what `switchworks generate` prints.

A hole is a sentinel, printed as <extra_id_0>, <extra_id_1>, ... The model writes each sentinel and
then the text of its hole, as in its training targets.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path

import torch

from switchworks.checkpoint import load, require_tokenizer
from switchworks.config import ConfigError
from switchworks.data import Tokenizer
from switchworks.device import compute_device
from switchworks.generate.batches import GenerationConfig, generate_all
from switchworks.model import EOS, SwitchTransformer
from switchworks.quantise import quantise

HOLE = re.compile(r"<extra_id_(\d+)>")


def load_with_tokenizer(
    path: Path, dtype: torch.dtype | None = None
) -> tuple[SwitchTransformer, Tokenizer]:
    """The model in `path` on the compute device. Raises CheckpointError without a tokenizer."""
    model, tokenizer = load(path, compute_device(), dtype)
    return model, require_tokenizer(path, tokenizer)


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
    model, tokenizer = load_with_tokenizer(path, dtype)
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
        with source.open(encoding="utf-8-sig") as file:  # unlike `splitlines`, not split at U+2028
            lines = [line.rstrip("\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{source} cannot be read: {error}.\n  --file takes UTF-8 text, one text in each line."
        ) from error
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise ConfigError(f"{source} holds no text.\n  --file takes one text in each line.")
    completed = iter(complete(path, texts, config, int8=int8, dtype=dtype))
    results = [" ".join(next(completed).splitlines()) if line.strip() else "" for line in lines]
    if output is not None:
        output.write_text("".join(f"{text}\n" for text in results), encoding="utf-8")
    return results


def fill_texts(
    model: SwitchTransformer, tokenizer: Tokenizer, texts: Sequence[str], config: GenerationConfig
) -> list[str]:
    """`texts` with every hole <extra_id_N> filled in square brackets; see `complete`."""
    if not all(text.strip() for text in texts):
        raise ConfigError('There is no text to fill in. Example: "The <extra_id_0> of the list."')
    texts = [text if HOLE.search(text) else f"{text.rstrip()} <extra_id_0>" for text in texts]
    written = generate_all(model, [[*tokenizer.encode(text), EOS] for text in texts], config)
    return [
        fill(text, parse_fills(tokenizer.decode(ids)))
        for text, ids in zip(texts, written, strict=True)
    ]


def parse_fills(text: str) -> dict[int, str]:
    """Hole number -> text. Text before the first hole is left out. Of a hole that is named twice
    the first text counts."""
    parts = HOLE.split(text)
    fills: dict[int, str] = {}
    for number, hole in zip(parts[1::2], parts[2::2], strict=True):
        fills.setdefault(int(number), hole.strip())
    return fills


def fill(text: str, fills: Mapping[int, str]) -> str:
    """`text` with every hole replaced by its fill in square brackets, if it has one."""

    def replacement(hole: re.Match[str]) -> str:
        number = int(hole[1])
        return f"[{fills[number]}]" if number in fills else hole[0]

    return HOLE.sub(replacement, text)


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
    written = generate_all(model, prompts, config)
    return [
        text + continuation(tokenizer, prompt, ids)
        for text, prompt, ids in zip(texts, prompts, written, strict=True)
    ]


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], written: Sequence[int]) -> str:
    """The text that `written` adds to the text of `prompt`, the space between them included.
    Decoded together, because alone the first token of `written` would lose its space and half a
    character would not be one."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *written])
    same = takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
    return whole[sum(1 for _ in same) :]
