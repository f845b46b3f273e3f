"""`switchworks generate PATH TEXT`: fill the holes of a text, or continue it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from switchworks.cli.decoding import DecodingFlags
from switchworks.cli.parsing import check_needed, check_writable, parse_flags
from switchworks.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class GenerateFlags(DecodingFlags):
    """Fill the holes of a text, or continue it."""

    path: tyro.conf.Positional[Path]
    """A run directory or a model directory."""
    text: tyro.conf.Positional[str | None] = None
    """Text with holes <extra_id_0>, <extra_id_1>, ... Without a hole one is added at the end. A
    decoder-only model continues the text and fills no holes."""
    file: Path | None = None
    """Many texts instead, one in each line."""
    output: Path | None = None
    """Where their answers go, one in each line. Default: they are printed."""
    temperature: float = 0.0
    """0 always takes the likeliest token; 1 samples the model's own distribution."""
    top_k: int | None = None
    """With a temperature, only this many of the likeliest tokens may be chosen."""
    top_p: float | None = None
    """With a temperature, only the likeliest that together hold this much probability may be."""
    seed: int = 0
    """With a temperature, another seed gives other texts."""
    int8: bool = False
    """Quantise the weights to 8 bits first, and where the CPU multiplies 8-bit integers (VNNI) the
    inputs of products, too: a quarter of the memory, nearly the same answers."""
    compile: bool = False
    """Compile the step of decoding, which takes a minute for a new model and batch size: for many
    texts, of which each token then takes two thirds of its time at batch size 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("top_k", "top_p", "seed"):
            check_needed(self, name, "--temperature > 0", given=self.temperature != 0)
        check_needed(self, "output", "--file", given=self.file is not None)


def run(words: list[str]) -> int:
    """Print or write the model's answers."""
    flags = parse_flags(GenerateFlags, "generate", words)
    check_writable(flags.output)
    if (flags.text is None) == (flags.file is None):
        raise ConfigError(
            "switchworks generate needs one text, or --file with a text in each line.\n"
            '  Example: switchworks generate runs/quickstart "The <extra_id_0> of the list."'
        )
    from switchworks.generate import GenerationConfig, Sampling, complete, complete_file

    config = GenerationConfig(
        max_length=flags.max_length,
        sampling=Sampling(
            temperature=flags.temperature, top_k=flags.top_k, top_p=flags.top_p, seed=flags.seed
        ),
        beams=flags.beam_search(),
        batch_size=flags.batch_size,
        compile=flags.compile,
    )
    weights: dict[str, Any] = {"int8": flags.int8, "dtype": flags.dtype()}
    if flags.file is None:
        print(*complete(flags.path, [flags.text or ""], config, **weights))
    else:
        answers = complete_file(flags.path, flags.file, config, flags.output, **weights)
        print(f"{len(answers)} texts  {flags.output}" if flags.output else "\n".join(answers))
    return 0
