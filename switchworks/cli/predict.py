"""`switchworks predict RUN --input new.csv:text`: answers to new inputs."""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from switchworks.checkpoint import state_at
from switchworks.cli import parsing
from switchworks.evaluate import predict
from switchworks.generate import GenerationConfig


@dataclass(frozen=True, kw_only=True)
class PredictFlags:
    """Answer new inputs: a label with its probability where the run was trained on classes, text
    else. A call that was interrupted goes on where it was."""

    path: tyro.conf.Positional[Path]
    """A run directory, one of its checkpoints, or a model directory."""
    input: str
    """PATH or PATH:COLUMN of a table (.csv, .tsv, .jsonl, .parquet), a file with a text in each
    line, or - for lines of standard input (-:COLUMN for JSON lines). Default column: the one that
    the run read."""
    output: Path | None = None
    """A .csv, .tsv or .jsonl file with the input's columns and the answers, or one of plain lines.
    Default, or -: standard output."""
    task: str | None = None
    """Which of the tasks of the run it is, if there are several."""
    labels: tuple[str, ...] = ()
    """The possible answers. Default: those that the run was trained on, if they were few."""
    step: int | None = None
    """Of a run: its checkpoint of this step, in place of its model."""
    config: tyro.conf.OmitArgPrefixes[GenerationConfig] = field(default_factory=GenerationConfig)
    """How answers are written."""
    precision: parsing.Precision = "stored"
    """What to compute in: as the weights are stored (float32 after training), or auto, which is
    bfloat16 where this machine multiplies it faster."""
    int8: bool = False
    """Quantise the weights to 8 bits first."""

    def __post_init__(self) -> None:
        parsing.check_decoding(self.config)


def run(words: list[str]) -> int:
    """Print or write the answers."""
    flags = parsing.parse_flags(PredictFlags, "predict", words)
    output = None if flags.output == Path("-") else flags.output
    parsing.check_writable(output)
    count = predict(
        state_at(flags.path, flags.step),
        flags.input,
        output,
        flags.config,
        task=flags.task,
        labels=flags.labels,
        int8=flags.int8,
        dtype=parsing.dtype_of(flags.precision),
    )
    if output is not None:
        print(f"{count:,} answers  {output}")
    return 0
