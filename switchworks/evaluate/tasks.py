"""Tasks measured: examples, answers and figures, as a table, JSON and JSON lines.

`evaluate_tasks` is `switchworks evaluate PATH --tasks ...`; training measures with `measure`.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from switchworks import data
from switchworks.config import ConfigError, DataError
from switchworks.disk import whole_file
from switchworks.evaluate.answers import DecodingConfig, answer, check_choices
from switchworks.evaluate.metrics import averages, check_metrics, judge, score, signatures
from switchworks.generate import load_with_tokenizer
from switchworks.model import SwitchTransformer
from switchworks.parallel import SINGLE, Ranks

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalSet:
    """The examples of a split that a task is measured on, out of `total`."""

    task: data.Task
    split: str
    examples: tuple[data.Example, ...]
    total: int
    unanswered: int = 0
    """Examples left out because they have no target, or their label is withheld."""


@dataclass(frozen=True)
class TaskResult:
    """A model's answers to a task, and their figures."""

    eval_set: EvalSet
    predictions: tuple[str, ...]
    figures: Mapping[str, float]
    cut: int
    """Number of inputs longer than the limit, which lost their end."""

    @property
    def name(self) -> str:
        return self.eval_set.task.name

    @property
    def score(self) -> float:
        """The figures as one number; see `metrics.score`."""
        return score(self.eval_set.task, self.figures)

    def as_dict(self) -> dict[str, Any]:
        """The result without its examples, as plain values."""
        return {
            "split": self.eval_set.split,
            "examples": len(self.predictions),
            "of": self.eval_set.total,
            "without_target": self.eval_set.unanswered,
            "inputs_cut": self.cut,
            "score": self.score,
            "metrics": dict(self.figures),
            "signatures": signatures(self.eval_set.task, self.eval_set.examples),
        }


def build_eval_set(task: data.Task, split: str, places: data.Places, most: int = 0) -> EvalSet:
    """The examples of a split, or at most `most` of them, evenly spread over it.

    Examples of one group are judged together and stay together, so of groups there may be a few
    more or less. Raises DataError if there is no such split, no data, or if its labels are
    withheld.
    """
    counts = data.Counts()
    read = list(data.examples_of(task, split, places, counts, judged=True))
    examples = [example for example in read if example.target != data.UNKNOWN]
    if not examples:
        raise DataError(
            f"The {split} split of task {task.name!r} has no labels: they are withheld.\n"
            "  Use --split validation."
        )
    unanswered, total = counts.empty + len(read) - len(examples), len(examples)
    if most and total > most:
        examples = _spread(examples, most)
    return EvalSet(task, split, tuple(examples), total, unanswered)


def _spread(examples: list[data.Example], most: int) -> list[data.Example]:
    """About `most` of `examples`, evenly spread: whole groups, where there are groups."""
    if all(example.group is None for example in examples):
        return [examples[place * len(examples) // most] for place in range(most)]
    groups: dict[str | None, list[data.Example]] = {}
    for example in examples:
        groups.setdefault(example.group, []).append(example)
    members, number = list(groups.values()), max(1, most * len(groups) // len(examples))
    places = (place * len(members) // number for place in range(number))
    return [example for place in places for example in members[place]]


def measure(
    model: SwitchTransformer,
    tokenizer: data.Tokenizer,
    eval_set: EvalSet,
    config: DecodingConfig,
    ranks: Ranks = SINGLE,
) -> TaskResult:
    """The model's answers to `eval_set`, judged. All `ranks` call it together, see `answer`."""
    predictions = answer(model, tokenizer, eval_set.task, eval_set.examples, config, ranks)
    figures = judge(eval_set.task, predictions, eval_set.examples)
    encoded = tokenizer.encode_batch([example.inputs for example in eval_set.examples])
    cut = sum(len(ids) >= (config.input_length or math.inf) for ids in encoded)
    return TaskResult(eval_set, tuple(predictions), figures, cut)


def named_tasks(
    path: Path, tasks: Sequence[str], folder: Path | None, **tables: Any
) -> data.DataConfig:
    """The data settings to evaluate with: those of the run in `path`, if it is one.

    `tasks`, if any are named, replace the run's; `folder` holds local copies of their datasets.
    `tables`: labels, metrics, delimiter, quoting and skip_bad of tables, as in data.task_labels
    and so on, if they are not the default. By default tables with the names of the run's tables
    have the run's; if one is not among those, all have accuracy of any text.
    """
    settings = data.run_data_config(path) or data.DataConfig()
    named = tuple(name for entry in tasks for name in entry.split(",") if name)
    if named:
        length = settings.input_length or data.DataConfig().input_length  # that of causal text is 0
        if _tables(named) - _tables(settings.tasks):
            settings = replace(settings, task_labels=(), task_metrics=data.DataConfig.task_metrics)
        settings = replace(
            settings, tasks=named, mixture=(), input_length=length, task_packing="auto"
        )
    given = {f"task_{name}": value for name, value in tables.items()}
    given["task_folder"] = str(folder or "")
    values = {name: value for name, value in given.items() if value and value != "auto"}
    return replace(settings, **values)


def _tables(entries: Sequence[str]) -> set[str]:
    """Names of the entries that are tables, NAME=PATH:INPUT:TARGET."""
    return {entry.partition("=")[0] for entry in entries if "=" in entry}


def evaluate_tasks(
    path: Path,
    settings: data.DataConfig,
    config: DecodingConfig,
    *,
    split: str = "validation",
    **weights: Any,
) -> list[TaskResult]:
    """The model in `path` measured on the tasks of `settings`.

    `weights` are settings of `load_with_tokenizer`. Tasks without the split are left out with a
    warning. Raises CheckpointError if there is no tokenizer, and before anything is answered
    ConfigError or DataError for tasks that cannot be read or judged.
    """
    places, tasks = data.places_of(settings), _with_split(data.tasks_of(settings), split)
    eval_sets = [build_eval_set(task, split, places, config.examples) for task in tasks]
    if not eval_sets:
        raise ConfigError("There is no task to evaluate. Name one: --tasks glue_rte.")
    for eval_set in eval_sets:
        check_metrics(eval_set.task, eval_set.examples)
        if config.decode == "rank":
            check_choices(eval_set.task, eval_set.examples)
    model, tokenizer = load_with_tokenizer(path, **weights)
    return [measure(model, tokenizer, eval_set, config) for eval_set in eval_sets]


def _with_split(tasks: Sequence[data.Task], split: str) -> list[data.Task]:
    """The tasks that have `split`; all if none has, so that reading them raises the error."""
    kept = [task for task in tasks if split in task.source.splits]
    for task in tasks:
        if kept and task not in kept:
            have = ", ".join(task.source.splits)
            _log.warning("%s has no %s split (it has: %s) and is left out", task.name, split, have)
    return kept or list(tasks)


def as_json(
    results: Sequence[TaskResult], config: DecodingConfig, model: str, command: str
) -> dict[str, Any]:
    """The results with the settings and the command that give them again."""
    return {
        "model": model,
        "command": command,
        "decode": config.decode,
        **(asdict(config.beams) if config.beams.beams > 1 else {}),
        **(asdict(config.sampling) if config.sampling.temperature else {}),
        "input_length": config.input_length,
        "max_length": config.max_length,
        "tasks": {result.name: result.as_dict() for result in results},
        "averages": averages({result.name: result.score for result in results}),
    }


def as_table(results: Sequence[TaskResult]) -> str:
    """One line for each task, and one for each benchmark whose tasks are all there."""
    width = max(len("super_glue"), *(len(result.name) for result in results))
    lines = [f"{'task':<{width}} {'split':<10} {'examples':>13} {'score':>7}  metrics"]
    for result in results:
        count, total = len(result.predictions), result.eval_set.total
        number = f"{count:,}" if count == total else f"{count:,} of {total:,}"
        figures = "  ".join(f"{name} {value:.2f}" for name, value in result.figures.items())
        cut = f"  ({result.cut:,} inputs cut)" if result.cut else ""
        if result.eval_set.unanswered:
            cut += f"  ({result.eval_set.unanswered:,} without a target left out)"
        lines.append(
            f"{result.name:<{width}} {result.eval_set.split:<10} {number:>13} "
            f"{result.score:>7.2f}  {figures}{cut}"
        )
    for name, value in averages({result.name: result.score for result in results}).items():
        lines.append(f"{name:<{width}} {'average':<10} {'':>13} {value:>7.2f}")
    for result in results:
        for name, text in signatures(result.eval_set.task, result.eval_set.examples).items():
            lines.append(f"{result.name}: {name} is {text}")
    return "\n".join(lines)


def write_predictions(path: Path, results: Iterable[TaskResult]) -> None:
    """Write a JSON object per line: the task, the input, every right answer and the model's."""
    with whole_file(path) as aside, aside.open("w", encoding="utf-8") as file:
        for result in results:
            pairs = zip(result.eval_set.examples, result.predictions, strict=True)
            for example, prediction in pairs:
                line = {"task": result.name, "inputs": example.inputs}
                line |= {"answers": list(example.answers), "prediction": prediction}
                extra = {"label": example.label, "group": example.group}
                line |= {name: value for name, value in extra.items() if value is not None}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
