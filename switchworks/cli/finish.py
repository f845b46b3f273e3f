"""`switchworks finish RUN`: the model and the report of a run that has not ended."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from switchworks.cli.parsing import parse_flags


@dataclass(frozen=True)
class FinishFlags:
    """End a run now: write its model and report as they are at its newest checkpoint. It can be
    resumed all the same."""

    run: tyro.conf.Positional[Path]
    """A run directory."""
    step: int | None = None
    """The model of this step's checkpoint."""


def run(words: list[str]) -> int:
    """Write them, and print where they are."""
    flags = parse_flags(FinishFlags, "finish", words)
    from switchworks.training import finish

    step = finish(flags.run, flags.step)
    print(f"model   {flags.run / 'model'}, of step {step}")
    print(f"report  {(flags.run / 'report.html').resolve()}")
    return 0
