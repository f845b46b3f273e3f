"""`switchworks evaluate PATH --tasks ...`: from a model on disk to figures."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from switchworks.checkpoint import load
from switchworks.config import CheckpointError, ConfigError
from switchworks.data import DataConfig, Task, places_of, run_data_config, tasks_of
from switchworks.device import compute_device
from switchworks.evaluate.answers import DecodingConfig, check_choices
from switchworks.evaluate.metrics import check_metrics
from switchworks.evaluate.tasks import TaskResult, measure, questions_of

_log = logging.getLogger(__name__)


def named_tasks(
    path: Path,
    tasks: Sequence[str],
    folder: Path | None,
    *,
    labels: tuple[str, ...] = (),
    metrics: tuple[str, ...] = (),
) -> DataConfig:
    """The data settings to evaluate with: those of the run in `path` if it is one, with `tasks`
    in place of its own if any are named, and their local copies in `folder`.

    `labels` and `metrics` are those of tables. Without them tables have those of the run if they
    are all its own, by name, and accuracy of any text if none is. Raises ConfigError for both at
    once where the run's are others than that.
    """
    data = run_data_config(path) or DataConfig()
    named = tuple(name for entry in tasks for name in entry.split(",") if name)
    if named:
        room = data.input_length or DataConfig().input_length  # causal text has none for inputs
        if not (labels and metrics):
            data = _judged_by(data, _tables(data.tasks), _tables(named))
        data = replace(data, tasks=named, mixture=(), input_length=room, task_packing="auto")
    if labels:
        data = replace(data, task_labels=labels)
    if metrics:
        data = replace(data, task_metrics=metrics)
    if folder is not None:
        data = replace(data, task_folder=str(folder))
    return data


def _tables(entries: Sequence[str]) -> set[str]:
    """The names of those that are tables, NAME=PATH:INPUT:TARGET."""
    return {entry.partition("=")[0] for entry in entries if "=" in entry}


def _judged_by(data: DataConfig, own: set[str], named: set[str]) -> DataConfig:
    """The settings of a run, whose tables are `own`, with labels and metrics for those `named`."""
    new = named - own
    plain = replace(data, task_labels=(), task_metrics=DataConfig.task_metrics)
    if new and new != named and plain != data:
        raise ConfigError(
            f"{', '.join(sorted(named - new))} has the labels and metrics of the run, "
            f"{', '.join(sorted(new))} has not.\n"
            "  Measure them one after the other, or say for both: --task-labels, --task-metrics."
        )
    return plain if new else data


def evaluate_tasks(
    path: Path,
    data: DataConfig,
    how: DecodingConfig,
    *,
    split: str = "validation",
    dtype: torch.dtype | None = None,
) -> list[TaskResult]:
    """The model in `path` measured on the tasks of `data`, in `dtype` or as it is stored. Of
    several tasks those without that split are left out, which the log says.

    Raises CheckpointError if it has no tokenizer, and before anything is answered ConfigError or
    DataError for tasks whose names or data cannot be used.
    """
    places, tasks = places_of(data), _with_split(tasks_of(data), split)
    asked = [questions_of(task, split, places, how.examples) for task in tasks]
    if not asked:
        raise ConfigError("There is no task to evaluate. Name one: --tasks glue_rte.")
    for questions in asked:
        check_metrics(questions.task, questions.examples)
        if how.decode == "rank":
            check_choices(questions.task, questions.examples)
    model, tokenizer = load(path, compute_device(), dtype)
    if tokenizer is None:
        raise CheckpointError(
            f"{path} holds a model without a tokenizer, so it cannot read a task.\n"
            "  Save it with one: switchworks.save(model, directory, tokenizer)."
        )
    return [measure(model, tokenizer, questions, how) for questions in asked]


def _with_split(tasks: Sequence[Task], split: str) -> list[Task]:
    """The tasks that have `split`; all if none has, which is an error that says what there is."""
    found = [task for task in tasks if split in task.source.splits]
    for task in tasks:
        if found and task not in found:
            have = ", ".join(task.source.splits)
            _log.warning("%s has no %s split (it has: %s) and is left out", task.name, split, have)
    return found or list(tasks)
