"""From text to text: what `switchworks generate` prints.

A hole is a sentinel, printed as <extra_id_0>, <extra_id_1>, ... The model writes each sentinel and
then the text of its hole, as in its training targets.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch

from switchworks.checkpoint import load, require_tokenizer
from switchworks.config import ConfigError
from switchworks.data import Tokenizer
from switchworks.device import compute_device
from switchworks.disk import write_text
from switchworks.generate.batches import (
    Candidate,
    GenerationConfig,
    generate_all,
    generate_candidates,
    pad,
    stream,
)
from switchworks.generate.constraints import continuation
from switchworks.model import EOS, SwitchTransformer
from switchworks.quantise import quantise

HOLE = re.compile(r"<extra_id_(\d{1,9})>")  # Python reads no number of any length


def load_with_tokenizer(
    path: Path,
    dtype: torch.dtype | None = None,
    *,
    int8: bool = False,
    expert_memory: int | None = None,
) -> tuple[SwitchTransformer, Tokenizer]:
    """The model in `path` on the compute device. Raises CheckpointError without a tokenizer.

    `dtype` is what the model computes in, None: as it is stored. With `int8` the weights are
    quantised to 8 bits. With `expert_memory` it is on the CPU, with at most so many bytes of
    experts in memory and the others on disk (`load_paged`).
    """
    if expert_memory is None:
        model, tokenizer = load(path, compute_device(), dtype)
    else:
        from switchworks.paging import load_paged

        model, tokenizer = load_paged(path, expert_memory, dtype)
    return (quantise(model) if int8 else model), require_tokenizer(path, tokenizer)


class CandidateText(NamedTuple):
    """One completion of a text, how likely it is (`Scored`), and its tokens with theirs."""

    text: str
    score: float
    tokens: list[str]
    log_probs: list[float]
    ids: list[int]


def complete(
    path: Path, texts: Sequence[str], config: GenerationConfig, **weights: Any
) -> list[str]:
    """`texts` with their holes filled by the model in `path`, fills in square brackets.

    A text without a hole gets one at its end, so it is continued. A decoder-only model only
    continues, and its text follows without brackets. `weights` are settings of
    `load_with_tokenizer`. Raises CheckpointError if the model has no tokenizer, ConfigError if
    there is no text.
    """
    model, tokenizer = load_with_tokenizer(path, **weights)
    answers = write_texts(model, tokenizer, texts, config)
    print_expert_cache(model)
    return answers


def print_expert_cache(model: SwitchTransformer) -> None:
    """Print a line to standard error about the experts that were read from disk, if they are."""
    from switchworks.paging import expert_cache

    if (figures := expert_cache(model)) is not None:
        print(figures, file=sys.stderr)


def complete_file(
    path: Path, source: Path, config: GenerationConfig, output: Path | None = None, **weights: Any
) -> list[str]:
    """`complete` for every line of `source` ("-": standard input); also written to `output`, if
    given, line by line.

    An empty line stays empty. Raises ConfigError if there is no text.
    """
    try:
        # Unlike by `splitlines`, a line is not split at U+2028.
        with nullcontext(sys.stdin) if str(source) == "-" else _opened(source) as file:
            lines = [line.rstrip("\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{source} cannot be read: {error}.\n  --file takes UTF-8 text, one text in each line."
        ) from error
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise ConfigError(f"{source} holds no text.\n  --file takes one text in each line.")
    completed = iter(complete(path, texts, config, **weights))
    results = [" ".join(next(completed).splitlines()) if line.strip() else "" for line in lines]
    if output is not None:
        write_text(output, (f"{text}\n" for text in results))
    return results


def _opened(path: Path) -> TextIO:
    return path.open(encoding="utf-8-sig")


class Prompt(NamedTuple):
    """A text as a model reads it."""

    ids: list[int]
    show: Callable[[Sequence[int]], str]
    """The whole text, given the tokens that were written."""
    holes: tuple[int, ...] = ()
    """The numbers of its holes; the model's are counted from 0."""


def write_texts(
    model: SwitchTransformer, tokenizer: Tokenizer, texts: Sequence[str], config: GenerationConfig
) -> list[str]:
    """`texts` with every hole filled, or continued; see `complete`."""
    prompts = make_prompts(model, tokenizer, texts, config)
    ids = [prompt.ids for prompt in prompts]
    written = generate_all(model, ids, config, tokenizer=tokenizer)
    return [prompt.show(tokens) for prompt, tokens in zip(prompts, written, strict=True)]


def write_candidates(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    config: GenerationConfig,
    count: int,
) -> list[list[CandidateText]]:
    """`count` completions of each text as `complete` has them, the likeliest first."""
    prompts = make_prompts(model, tokenizer, texts, config)
    ids = [prompt.ids for prompt in prompts]
    written = generate_candidates(model, ids, config, count, tokenizer=tokenizer)

    def as_text(prompt: Prompt, candidate: Candidate) -> CandidateText:
        tokens, score, log_probs = candidate
        pieces = [tokenizer.piece(id_) for id_ in tokens]
        return CandidateText(prompt.show(tokens), score, pieces, log_probs, tokens)

    pairs = zip(prompts, written, strict=True)
    return [[as_text(prompt, each) for each in candidates] for prompt, candidates in pairs]


def stream_text(
    model: SwitchTransformer, tokenizer: Tokenizer, text: str, config: GenerationConfig
) -> Iterator[str]:
    """What the model writes for `text`, piece by piece as it is written, without beams: a
    decoder-only model's continuation, or else the holes' names and their fills."""
    (prompt,) = make_prompts(model, tokenizer, [text], config)
    before = prompt.ids if model.config.decoder_only else []
    steps = stream(
        model,
        pad([prompt.ids]).to(model.embedding.weight.device),
        max_length=config.max_length,
        sampling=config.sampling,
        constraints=config.constraints(tokenizer),
    )
    ids, shown, whole = list[int](), 0, ""
    for token in steps:
        ids.append(int(token))
        whole = continuation(tokenizer, before, ids)
        ready = len(whole.rstrip("\ufffd"))  # half a character waits for its rest
        yield whole[shown:ready]
        shown = max(shown, ready)
    yield whole[shown:]


def make_prompts(
    model: SwitchTransformer, tokenizer: Tokenizer, texts: Sequence[str], config: GenerationConfig
) -> list[Prompt]:
    """`texts` as `complete` reads them. Raises ConfigError for one that cannot be."""
    prompts = (_to_continue if model.config.decoder_only else _to_fill)(tokenizer, texts)
    for text, prompt in zip(texts, prompts, strict=True):
        if len(prompt.ids) > config.max_input:
            raise ConfigError(
                f"The text {text[:40]!r}... has {len(prompt.ids):,} tokens, and at most "
                f"{config.max_input:,} are read.\n  Cut it, or raise --max-input: twice as many "
                "take four times the memory."
            )
    return prompts


def _to_fill(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Prompt]:
    if not all(text.strip() for text in texts):
        raise ConfigError('There is no text to fill in. Example: "The <extra_id_0> of the list."')
    texts = [text if HOLE.search(text) else f"{text.rstrip()} <extra_id_0>" for text in texts]

    def prompt(text: str) -> Prompt:
        numbers = list(dict.fromkeys(int(number) for number in HOLE.findall(text)))
        if len(numbers) > tokenizer.num_sentinels:
            raise ConfigError(
                f"The text has {len(numbers)} holes, and the tokenizer has names for "
                f"{tokenizer.num_sentinels}.\n  Fill it in parts."
            )
        # A model has seen holes counted from 0 alone.
        counted = HOLE.sub(lambda hole: f"<extra_id_{numbers.index(int(hole[1]))}>", text)

        def show(ids: Sequence[int]) -> str:
            fills = parse_fills(tokenizer.decode(ids))
            return fill(text, {n: fills[i] for i, n in enumerate(numbers) if i in fills})

        return Prompt([*tokenizer.encode(counted), EOS], show, tuple(numbers))

    return [prompt(text) for text in texts]


def _to_continue(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Prompt]:
    """An empty text starts a new one."""
    if any(HOLE.search(text) for text in texts):
        raise ConfigError(
            "This model is decoder-only: it continues a text and cannot fill holes inside it.\n"
            "  Give the text up to the first <extra_id_N>."
        )

    def show(text: str, prompt: list[int], ids: Sequence[int]) -> str:
        return text + continuation(tokenizer, prompt, ids)

    pairs = [(text, tokenizer.encode(text)) for text in map(str.rstrip, texts)]
    return [Prompt(prompt, partial(show, text, prompt)) for text, prompt in pairs]


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
