"""A run directory: what a run writes, where, and whose it is.

experiment.toml     every setting, enough to repeat the run
about.json          sizes, machine, versions, command
metrics.jsonl       a line per report        samples.jsonl   a line per fill-in
tensorboard/        the same numbers
checkpoints/        step_XXXXXXXX/: everything needed to go on
model/              what `switchworks.load` opens
adapters/           with lora: what was trained, by itself
best/               with best: the best weights so far, ready to use; best.json says whose
report.html
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from switchworks.checkpoint import weights_hash
from switchworks.config import ConfigError, DataError, differences, from_toml, to_toml
from switchworks.data import TextDataset, run_metadata
from switchworks.optim import learning_rate
from switchworks.training.experiment import MAY_CHANGE, Experiment

_ENDLESS = ("rsqrt", "constant")
"""Schedules that do not depend on the last step, so that a run may be made longer at any time."""


def may_resume(
    path: Path, experiment: Experiment, *, resume: bool, ignoring: frozenset[str] = frozenset()
) -> bool:
    """Whether `path` holds this experiment, to go on with; False if it is free. Writes nothing.

    Settings named in `ignoring` are not compared. A run whose schedule ends with its last step may
    be made longer when it has come there, not before. Raises ConfigError if it holds another
    experiment (the message lists the differences), the same one while `resume` is False, or
    files that are no run's.
    """
    found = settings_in(path)
    if found is None:
        _refuse_foreign_files(path)
        return False
    free = MAY_CHANGE | ignoring | ({"steps"} if _may_be_longer(path, found, experiment) else set())
    changed = {
        name: pair for name, pair in differences(found, experiment).items() if name not in free
    }
    if changed:
        raise ConfigError(
            f"{path} already holds another experiment. It differs in:\n"
            + "".join(
                f"    {name}: {old} there, {new} now\n" for name, (old, new) in changed.items()
            )
            + "  Choose another --run-dir, or make the settings agree and add --resume."
        )
    if not resume:
        raise ConfigError(
            f"{path} already holds this very experiment.\n"
            "  Add --resume to go on where it stopped, or choose another --run-dir."
        )
    return True


def require_writable(path: Path) -> None:
    """Raises ConfigError if nothing can be written to `path`, which need not be there yet."""
    place = path
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        what = "may not be written" if place.is_dir() else "is no folder"
        raise ConfigError(f"--run-dir {path} cannot be: {place} {what}.\n  Choose another one.")


def _may_be_longer(path: Path, found: Experiment, experiment: Experiment) -> bool:
    if experiment.optim.schedule in _ENDLESS:
        return True
    finished = (path / "checkpoints" / f"step_{found.steps:08d}").is_dir()
    return finished and experiment.steps > found.steps


def made_longer(path: Path, experiment: Experiment) -> str:
    """What more steps than the run of `path` was to have do to its rate, as a line; often empty."""
    found = settings_in(path)
    if found is None or found.steps == experiment.steps or experiment.optim.schedule in _ENDLESS:
        return ""
    old, new = (learning_rate(run.optim, found.steps, run.steps) for run in (found, experiment))
    return (
        f"made longer: {found.steps} steps were to be all and ended at a learning rate of "
        f"{old:.3g}; it goes on at {new:.3g}, as in a run of {experiment.steps}\n"
    )


def settings_in(path: Path) -> Experiment | None:
    """The experiment whose directory `path` is; None if it is nobody's."""
    file = path / "experiment.toml"
    return from_toml(Experiment, file) if file.exists() else None


def claim(path: Path, experiment: Experiment, about: Mapping[str, Any] | None = None) -> None:
    """Make `path` the directory of `experiment`: its experiment.toml says so, beside `about`.

    Of a run that goes on, what `about` says of how it began stays as it was, and each sitting is
    listed.
    """
    path.mkdir(parents=True, exist_ok=True)
    if about is not None:
        before = run_metadata(path) if (path / "experiment.toml").exists() else {}
        began = {name: before[name] for name in _BEGAN if name in before}
        sitting = {name: about[name] for name in _SITTING if name in about}
        sittings = [*before.get("sittings", []), sitting]
        kept = {**about, **began, "sittings": sittings}
        _put(path / "about.json", json.dumps(kept, indent=2) + "\n")
    _put(path / "experiment.toml", to_toml(experiment))


_BEGAN = ("command", "started", "init", "init_weights")
_SITTING = ("command", "started", "machine", "threads", "torch", "version")


def launched_by(path: Path) -> str | None:
    """The name of torchrun's launch that last trained in `path`; None if there was none."""
    return run_metadata(path).get("launch")


def require_same_beginning(path: Path, init: Path | str | None) -> None:
    """Raises ConfigError if the run in `path` began with other weights than those in `init`.

    Without `init` it goes on whatever it began with.
    """
    about = run_metadata(path)
    if init is None or "init" not in about:  # an older version did not note it
        return
    if about["init"] is None:
        raise ConfigError(
            f"{path} began with first values, and not with the weights in {init}.\n"
            "  Leave --init out to go on, or choose another --run-dir."
        )
    if about["init_weights"] != weights_hash(Path(init)):
        raise ConfigError(
            f"{path} began with the weights in {about['init']}, and those in {init} are others.\n"
            "  Leave --init out to go on, or choose another --run-dir."
        )


def require_same_text(path: Path, corpora: TextDataset) -> None:
    """Raises DataError if `corpora` is not the text, as tokens, that the run in `path` read."""
    if (other := corpora.difference(run_metadata(path))) is not None:
        raise DataError(
            f"The text here is not what {path} was trained on: {other}.\n"
            "  Files, the tokenizer or packages with an embedded corpus have changed since.\n"
            f"  Restore them, or begin another run with its weights: --init {path} "
            f"--data.tokenizer {path}."
        )


def _put(path: Path, text: str) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


_BEGINNINGS = {"about.json", "about.tmp", "experiment.tmp"}
"""What a run has written that was killed before it was one."""


def _refuse_foreign_files(path: Path) -> None:
    if path.exists() and (
        not path.is_dir() or any(file.name not in _BEGINNINGS for file in path.iterdir())
    ):
        raise ConfigError(
            f"{path} exists and is not the directory of a run (it has no experiment.toml).\n"
            "  Choose another --run-dir, or an empty one."
        )
