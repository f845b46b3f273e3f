"""`switchworks train RECIPE`: any training, from text to a model and a report."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from switchworks.cli.main import print_error
from switchworks.cli.parsing import parse_experiment
from switchworks.config import ConfigError


@dataclass(frozen=True)
class TrainFlags:
    """Where a run lives and where it begins."""

    run_dir: Path | None = None
    """Where everything goes; default runs/NAME."""
    resume: bool = False
    """Continue the run that is in the run directory. `train --resume RUN_DIR` needs no recipe."""
    init: Path | None = None
    """Start from these weights: a run, a model directory of either format, a name on the Hub."""
    signal_status: int | None = None
    """The exit status after a signal that the run was saved at. Default 128 + its number: 130 after
    Ctrl-C, 143 after SIGTERM; 0 under torchrun, which starts workers that end otherwise anew."""


def run(words: list[str]) -> int:
    """Train; 128 + its number after a signal, 1 after divergence."""
    if words[:1] == ["--resume"] and len(words) > 1:  # of a run, which needs nothing else
        settings = Path(words[1], "experiment.toml")
        if not settings.is_file():
            raise ConfigError(f"There is no run in {words[1]} to resume.\n  Name a run directory.")
        words = [str(settings), "--run-dir", words[1], "--resume", *words[2:]]
    experiment, flags = parse_experiment("train", words, TrainFlags)
    from switchworks.training import DivergenceError, Interrupted, LostContactError, train

    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    is_main = os.environ.get("RANK", "0") == "0"  # of the processes of torchrun one prints
    try:
        run_dir = train(experiment, flags.run_dir, resume=flags.resume, init=flags.init)
    except Interrupted as stop:
        if is_main:
            print(stop)
        if flags.signal_status is not None:
            return flags.signal_status
        return (
            0 if under_torchrun and stop.signal != "SIGINT" else 128 + signal.Signals[stop.signal]
        )
    except (DivergenceError, LostContactError) as error:
        print_error(f"error: {error}")
        return 1
    if is_main:
        print(f"model   {run_dir / 'model'}")
        print(f"report  {(run_dir / 'report.html').resolve()}")
    return 0
