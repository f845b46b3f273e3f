"""A run directory: its files, and the checks before a run is started or resumed in it.

experiment.toml     every setting, enough to repeat the run
about.json          sizes, machine, versions, command
tokenizer/          so that a checkpoint is a model
metrics.jsonl       one line per measurement        samples.jsonl   one line per sample
tensorboard/        the same numbers
checkpoints/        step_XXXXXXXX/: everything needed to resume
model/              what `switchworks.load` opens
adapters/           with lora: the trained adapters by themselves
best/               with best: the best weights so far as models; best.json says of which step
classes.json        of tasks that are classifications: what the report says of them
report.html
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from switchworks import checkpoint, data
from switchworks.config import (
    CheckpointError,
    ConfigError,
    DataError,
    differences,
    from_toml,
    to_toml,
)
from switchworks.disk import write_json, write_text
from switchworks.training.experiment import MAY_CHANGE, Experiment


def may_resume(
    path: Path, experiment: Experiment, *, resume: bool, ignoring: frozenset[str] = frozenset()
) -> bool:
    """Whether `path` holds this experiment; False if it is free. Writes nothing.

    Settings in MAY_CHANGE and in `ignoring` are not compared. A run whose schedule ends with its
    last step may be made longer once it has finished, not before. Before a decay begins ("wsd", or
    "rsqrt" with one), its run may be made longer and shorter: a copy of the directory with other
    steps decays elsewhere. Raises ConfigError if `path` holds another experiment (listing the
    differences), the same one while `resume` is False, or files that do not belong to a run.
    """
    stored = settings_in(path)
    if stored is None:
        _refuse_foreign_files(path)
        if resume:
            raise ConfigError(
                f"There is no run in {path} to resume.\n"
                "  Leave out --resume to begin it, or give the run's --run-dir."
            )
        return False
    stored = replace(stored, data=data.with_absolute_paths(stored.data))
    free = MAY_CHANGE | ignoring
    if _may_be_longer(path, stored, experiment):
        free |= {"steps"}
    changed = differences(stored, experiment)
    lines = [f"    {x}: {a} there, {b} now\n" for x, (a, b) in changed.items() if x not in free]
    if lines:
        raise ConfigError(
            f"{path} already holds another experiment. It differs in:\n{''.join(lines)}"
            "  Choose another --run-dir, or make the settings agree and add --resume."
        )
    if not resume:
        raise ConfigError(
            f"{path} already holds this very experiment.\n"
            "  Add --resume to continue where it stopped, or choose another --run-dir."
        )
    return True


def require_writable(path: Path) -> None:
    """Raises ConfigError if `path`, which need not exist yet, cannot be written to."""
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "is not writable" if existing.is_dir() else "is not a folder"
        raise ConfigError(
            f"--run-dir {path} cannot be made: {existing} {reason}.\n  Choose another one."
        )


def _may_be_longer(path: Path, stored: Experiment, experiment: Experiment) -> bool:
    optim = experiment.optim
    if optim.schedule in ("cosine", "linear"):
        finished = (path / "checkpoints" / f"step_{stored.num_steps:08d}").is_dir()
        return finished and experiment.num_steps > stored.num_steps
    saved = max(checkpoint.steps_in(path / "checkpoints"), default=0)
    return saved <= min(optim.steps_in_common(run.num_steps) for run in (stored, experiment))


def settings_in(path: Path) -> Experiment | None:
    """The experiment whose directory `path` is; None if there is no experiment.toml."""
    file = path / "experiment.toml"
    return from_toml(Experiment, file) if file.exists() else None


def claim(
    path: Path,
    experiment: Experiment,
    about: Mapping[str, Any] | None = None,
    tokenizer: "data.Tokenizer | None" = None,
) -> None:
    """Make `path` the directory of `experiment` by writing experiment.toml, about.json and the
    tokenizer. For a resumed run about.json keeps what it says of the beginning, and lists every
    session."""
    path.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None and not (path / data.TOKENIZER).is_dir():
        otherwise = "The run has not begun."
        with checkpoint.whole_directory(
            path / data.TOKENIZER, needs=0, otherwise=otherwise
        ) as folder:
            tokenizer.save(folder)
    if about is not None:
        before = data.run_metadata(path) if (path / "experiment.toml").exists() else {}
        kept = {name: before[name] for name in _OF_BEGINNING if name in before}
        session = {name: about[name] for name in _OF_SESSION if name in about}
        contents = {**about, **kept, "sessions": [*before.get("sessions", []), session]}
        write_json(path / "about.json", contents)
    write_text(path / "experiment.toml", [to_toml(experiment)])


_OF_BEGINNING = ("id", "command", "started", "init", "init_weights")
_OF_SESSION = ("command", "started", "machine", "threads", "torch", "version")


def require_same_run(
    path: Path, init: Path | str | None, dataset: "data.TextDataset", teacher_weights: str | None
) -> None:
    """Raises ConfigError, DataError or CheckpointError unless the run in `path` began with the
    weights of `init` (None: with any), read this text, and has a teacher with these weights."""
    about = data.run_metadata(path)
    if not about:
        raise CheckpointError(
            f"{path / 'about.json'} is missing or empty, so nothing says which text and weights "
            "this run began with.\n  Put it back, or choose another --run-dir."
        )
    if init is not None and about.get("init_weights") != checkpoint.weights_hash(Path(init)):
        begun = f"the weights in {about['init']}" if about.get("init") else "initial weights"
        raise ConfigError(
            f"{path} began with {begun}, and those in {init} are others.\n"
            "  Leave --init out to continue, or choose another --run-dir."
        )
    if (difference := dataset.difference(about)) is not None:
        raise DataError(
            f"The text here is not what {path} was trained on: {difference}.\n"
            "  Files, the tokenizer or packages with an embedded corpus have changed since.\n"
            f"  Restore them, or begin another run with its weights: --init {path} "
            f"--data.tokenizer {path}."
        )
    if about.get("teacher_weights") != teacher_weights:
        raise CheckpointError(
            "The teacher is not the one this run began with: its weights have changed.\n"
            "  Restore them, or start again in another --run-dir."
        )


def _refuse_foreign_files(path: Path) -> None:
    if not path.exists():
        return
    # What is written before experiment.toml may be left by a run that was killed meanwhile.
    ours = {"about.json", data.TOKENIZER}
    names = {each.name for each in path.iterdir()} - ours if path.is_dir() else {path.name}
    if any(not name.startswith(".") for name in names):
        raise ConfigError(
            f"{path} exists and is not the directory of a run (it has no experiment.toml).\n"
            "  Choose another --run-dir, or an empty one."
        )
