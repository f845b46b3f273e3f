"""`switchworks evaluate PATH --tasks ...`: from a model on disk to figures."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from switchworks.checkpoint.model_files import load
from switchworks.config import CheckpointError, ConfigError
from switchworks.data.config import DataConfig
from switchworks.data.of_run import data_of_run
from switchworks.data.task_corpora import places_of, tasks_of
from switchworks.device import compute_device
from switchworks.evaluate.answers import Answering, check_choices
from switchworks.evaluate.metrics import check_metrics
from switchworks.evaluate.tasks import TaskResult, measure, questions_of


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

    `labels` and `metrics` are those of tables. Without them a table has those of the run if the run
    had one of that name, else accuracy of any text.
    """
    data = data_of_run(path) or DataConfig()
    named = tuple(name for entry in tasks for name in entry.split(",") if name)
    if named:
        room = data.input_length or DataConfig().input_length  # causal text has none for inputs
        if not {_name(entry) for entry in named} & {_name(entry) for entry in data.tasks}:
            data = replace(data, task_labels=(), task_metrics=DataConfig.task_metrics)
        data = replace(data, tasks=named, mixture=(), input_length=room, task_packing="auto")
    if labels:
        data = replace(data, task_labels=labels)
    if metrics:
        data = replace(data, task_metrics=metrics)
    if folder is not None:
        data = replace(data, task_folder=str(folder))
    return data


def _name(entry: str) -> str:
    return entry.partition("=")[0]


def evaluate_tasks(
    path: Path,
    data: DataConfig,
    how: Answering,
    *,
    split: str = "validation",
    dtype: torch.dtype | None = None,
) -> list[TaskResult]:
    """The model in `path` measured on the tasks of `data`, in `dtype` or as it is stored.

    Raises CheckpointError if it has no tokenizer, and before anything is answered ConfigError or
    DataError for tasks whose names or data cannot be used.
    """
    places, tasks = places_of(data), tasks_of(data)
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
