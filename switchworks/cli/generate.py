"""`switchworks generate PATH TEXT`: fill the holes of a text, or continue it."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from switchworks.checkpoint import state_at
from switchworks.cli import parsing
from switchworks.cli.main import print_error
from switchworks.config import ConfigError
from switchworks.disk import write_json
from switchworks.generate import (
    GenerationConfig,
    complete_file,
    load_with_tokenizer,
    print_expert_cache,
    stream_text,
    write_candidates,
    write_texts,
)

if TYPE_CHECKING:
    from switchworks.data import Tokenizer
    from switchworks.model import SwitchTransformer


@dataclass(frozen=True, kw_only=True)
class GenerateFlags:
    """Fill the holes of a text, or continue it."""

    path: tyro.conf.Positional[Path]
    """A run directory, one of its checkpoints, or a model directory."""
    text: tyro.conf.Positional[str | None] = None
    """Text with holes <extra_id_0>, <extra_id_1>, ... Without a hole one is added at the end. A
    decoder-only model continues the text and fills no holes. Default: lines of standard input,
    answered one by one by a model that stays loaded."""
    step: int | None = None
    """Of a run: its checkpoint of this step, in place of its model."""
    file: Path | None = None
    """Many texts instead, one in each line, answered together. -: standard input."""
    output: Path | None = None
    """Where their answers go, one in each line. Default: they are printed."""
    candidates: int = 1
    """Answers to the text, each printed behind its score; more than one need --beams or
    --temperature."""
    json: Path | None = None
    """Where the candidates go with scores, tokens and their log-probabilities."""
    stream: bool = False
    """Print what is written as it is written."""
    experts: bool = False
    """Print below each answer which expert of each switch layer read each token."""
    config: tyro.conf.OmitArgPrefixes[GenerationConfig] = field(default_factory=GenerationConfig)
    """How texts are written."""
    precision: parsing.Precision = "stored"
    """What to compute in: as the weights are stored (float32 after training), or auto, which is
    bfloat16 where this machine multiplies it faster."""
    int8: bool = False
    """Quantise the weights to 8 bits first, and where the CPU multiplies 8-bit integers (VNNI) the
    inputs of products, too: a quarter of the memory, nearly the same answers."""

    expert_memory: str | None = None
    """Memory for experts, such as 512MB, 2GB or 1.5GiB: the others stay on disk, and are read when
    they have tokens. The answers are the same. Default: all are in memory."""

    def __post_init__(self) -> None:
        parsing.check_decoding(self.config)
        parsing.parse_bytes(self.expert_memory, "--expert-memory")
        if self.int8 and self.expert_memory is not None:
            raise ConfigError(
                "--int8 quantises weights in memory, and with --expert-memory most are on disk.\n"
                "  Quantise the model's files first: switchworks convert PATH NEW --quantise int8."
            )
        parsing.check_needed(self, "output", "--file", given=self.file is not None)
        for name in ("candidates", "json", "stream"):
            parsing.check_needed(self, name, "TEXT", given=self.file is None)
        scored = self.candidates != 1 or self.json is not None
        if self.experts and (scored or self.stream or self.file is not None):
            raise ConfigError(
                "--experts is for single texts.\n  Leave out --file, --candidates, --json and "
                "--stream."
            )
        if self.stream and (scored or self.config.beams.beams > 1 or self.config.compile):
            raise ConfigError(
                "--stream prints tokens as they are written, and --beams, --candidates, --json and "
                "--compile need all of a text.\n  Leave out one or the other."
            )


def run(words: list[str]) -> int:
    """Print or write the model's answers."""
    flags = parsing.parse_flags(GenerateFlags, "generate", words)
    parsing.check_writable(flags.output, flags.json)
    if flags.text is not None and flags.file is not None:
        raise ConfigError(
            f"A text and --file {flags.file} are both to be answered.\n  Leave out one of them."
        )
    path = state_at(flags.path, flags.step)
    weights: dict[str, Any] = {
        "int8": flags.int8,
        "dtype": parsing.dtype_of(flags.precision),
        "expert_memory": parsing.parse_bytes(flags.expert_memory, "--expert-memory"),
    }
    if flags.text is not None:
        _write_one(flags, path, flags.text, weights)
    elif flags.file is not None:
        answers = complete_file(path, flags.file, flags.config, flags.output, **weights)
        print(f"{len(answers)} texts  {flags.output}" if flags.output else "\n".join(answers))
    else:
        model = load_with_tokenizer(path, **weights)
        _answer_lines(model, flags)
        print_expert_cache(model[0])
    return 0


def _answer_lines(model: "tuple[SwitchTransformer, Tokenizer]", flags: GenerateFlags) -> None:
    """Answer each line of standard input at once, until it ends. A text that cannot be answered is
    said, and the next one read."""
    if at_terminal := sys.stdin.isatty():
        print("A text with holes <extra_id_0>, <extra_id_1>, ... in each line; Ctrl-D ends.")
    while True:
        print("> " if at_terminal else "", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        line = line.rstrip("\n")
        try:
            _answer(model, line, flags) if line.strip() else print(flush=True)
        except ConfigError as error:
            print_error(f"error: {error}")


def _answer(model: "tuple[SwitchTransformer, Tokenizer]", text: str, flags: GenerateFlags) -> None:
    """Print the likeliest answer, and below it the experts of its tokens if they are wanted."""
    if not flags.experts:
        print(*write_texts(*model, [text], flags.config), flush=True)
        return
    from switchworks.evaluate import token_experts

    ((answer,),) = write_candidates(*model, [text], flags.config, 1)
    print(answer.text, flush=True)
    layers = token_experts(*model, text, answer.ids)
    width = max(map(len, layers))
    for name, tokens in layers.items():
        told = (f"{token.text.strip()}/{'+'.join(map(str, token.experts))}" for token in tokens)
        print(f"  {name:<{width}}  {' '.join(told)}", flush=True)


def _write_one(flags: GenerateFlags, path: Path, text: str, weights: dict[str, Any]) -> None:
    model = load_with_tokenizer(path, **weights)
    if flags.stream:
        for piece in stream_text(*model, text, flags.config):
            print(piece, end="", flush=True)
        print()
    elif flags.candidates == 1 and flags.json is None:
        _answer(model, text, flags)
    else:
        (answers,) = write_candidates(*model, [text], flags.config, flags.candidates)
        if flags.json is not None:
            figures = {"text": text, "candidates": [answer._asdict() for answer in answers]}
            write_json(flags.json, figures)
        print(*(f"{answer.score:8.3f}  {answer.text}" for answer in answers), sep="\n")
    print_expert_cache(model[0])
