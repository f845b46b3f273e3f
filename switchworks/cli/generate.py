"""`switchworks generate PATH TEXT`: fill the holes of a text, or continue it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from switchworks.cli import parsing
from switchworks.config import ConfigError
from switchworks.generate import GenerationConfig, complete, complete_file


@dataclass(frozen=True, kw_only=True)
class GenerateFlags:
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
    config: tyro.conf.OmitArgPrefixes[GenerationConfig] = GenerationConfig()  # noqa: RUF009
    precision: parsing.Precision = "stored"
    """What to compute in: as the weights are stored (float32 after training), or auto, which is
    bfloat16 where this machine multiplies it faster."""
    int8: bool = False
    """Quantise the weights to 8 bits first, and where the CPU multiplies 8-bit integers (VNNI) the
    inputs of products, too: a quarter of the memory, nearly the same answers."""

    def __post_init__(self) -> None:
        parsing.check_decoding(self.config)
        parsing.check_needed(self, "output", "--file", given=self.file is not None)


def run(words: list[str]) -> int:
    """Print or write the model's answers."""
    flags = parsing.parse_flags(GenerateFlags, "generate", words)
    parsing.check_writable(flags.output)
    if (flags.text is None) == (flags.file is None):
        raise ConfigError(
            "switchworks generate needs one text, or --file with a text in each line.\n"
            '  Example: switchworks generate runs/quickstart "The <extra_id_0> of the list."'
        )
    weights: dict[str, Any] = {"int8": flags.int8, "dtype": parsing.dtype_of(flags.precision)}
    if flags.file is None:
        print(*complete(flags.path, [flags.text or ""], flags.config, **weights))
    else:
        answers = complete_file(flags.path, flags.file, flags.config, flags.output, **weights)
        print(f"{len(answers)} texts  {flags.output}" if flags.output else "\n".join(answers))
    return 0
