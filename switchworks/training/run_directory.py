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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from switchworks.config import ConfigError, differences, from_toml, to_toml
from switchworks.training.experiment import MAY_CHANGE, Experiment

_ENDLESS = ("rsqrt", "constant")
"""Schedules that do not depend on the last step, so that a finished run may be made longer."""


def may_resume(
    path: Path, experiment: Experiment, *, resume: bool, ignoring: frozenset[str] = frozenset()
) -> bool:
    """Whether `path` holds this experiment, to go on with; False if it is free. Writes nothing.

    Settings named in `ignoring` are not compared. Raises ConfigError if it holds another
    experiment (the message lists the differences), the same one while `resume` is False, or
    files that are no run's.
    """
    found = settings_in(path)
    if found is None:
        _refuse_foreign_files(path)
        return False
    free = MAY_CHANGE | ignoring | ({"steps"} if experiment.optim.schedule in _ENDLESS else set())
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


def settings_in(path: Path) -> Experiment | None:
    """The experiment whose directory `path` is; None if it is nobody's."""
    file = path / "experiment.toml"
    return from_toml(Experiment, file) if file.exists() else None


def claim(path: Path, experiment: Experiment, about: Mapping[str, Any] | None = None) -> None:
    """Make `path` the directory of `experiment`: its experiment.toml says so, beside `about`."""
    path.mkdir(parents=True, exist_ok=True)
    if about is not None:
        _put(path / "about.json", json.dumps(about, indent=2) + "\n")
    _put(path / "experiment.toml", to_toml(experiment))


def launched_by(path: Path) -> str | None:
    """The name of torchrun's launch that last trained in `path`; None if there was none."""
    file = path / "about.json"
    return json.loads(file.read_text(encoding="utf-8")).get("launch") if file.exists() else None


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
