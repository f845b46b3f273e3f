"""Tasks measured: examples, answers, figures, and all of it as a table, JSON and JSON lines."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from switchworks.config import DataError
from switchworks.data import UNKNOWN, Counts, Example, Places, Task, Tokenizer, examples_of
from switchworks.evaluate.answers import DecodingConfig, answer
from switchworks.evaluate.metrics import averages, judge, score
from switchworks.model import SwitchTransformer
from switchworks.parallel import SINGLE, Ranks


@dataclass(frozen=True)
class EvalSet:
    """The examples of a split that a task is measured on, out of `total`."""

    task: Task
    split: str
    examples: tuple[Example, ...]
    total: int
    unanswered: int = 0
    """Left out because they have no target, or their label is withheld."""


@dataclass(frozen=True)
class TaskResult:
    """What a model made of a task."""

    questions: EvalSet
    predictions: tuple[str, ...]
    figures: Mapping[str, float]
    """Out of 100."""
    cut: int
    """Inputs longer than the limit, which lost their end."""

    @property
    def name(self) -> str:
        return self.questions.task.name

    @property
    def score(self) -> float:
        """The figures as one number; see `metrics.score`."""
        return score(self.questions.task, self.figures)

    def about(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "split": self.questions.split,
            "examples": len(self.predictions),
            "of": self.questions.total,
            "without_target": self.questions.unanswered,
            "inputs_cut": self.cut,
            "score": self.score,
            "metrics": dict(self.figures),
        }


def questions_of(task: Task, split: str, places: Places, most: int = 0) -> EvalSet:
    """The examples of a split, or at most `most` of them, evenly spread over it. Those of one group
    are judged together and stay together, so of groups there may be a few more or less.

    Raises DataError if there is no such split, no data, or if its labels are withheld.
    """
    counts = Counts()
    read = list(examples_of(task, split, places, counts, judged=True))
    found = [example for example in read if example.target != UNKNOWN]
    if not found:
        raise DataError(
            f"The {split} split of task {task.name!r} has no labels: they are withheld.\n"
            "  Use --split validation."
        )
    unanswered, total = counts.empty + len(read) - len(found), len(found)
    if most and total > most:
        found = _spread(found, most)
    return EvalSet(task, split, tuple(found), total, unanswered)


def _spread(examples: list[Example], most: int) -> list[Example]:
    """About `most` of more `examples`, evenly spread: whole groups, where there are groups."""
    if all(example.group is None for example in examples):
        return [examples[place * len(examples) // most] for place in range(most)]
    groups: dict[str | None, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.group, []).append(example)
    together, number = list(groups.values()), max(1, most * len(groups) // len(examples))
    places = (place * len(together) // number for place in range(number))
    return [example for place in places for example in together[place]]


def measure(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    questions: EvalSet,
    how: DecodingConfig,
    ranks: Ranks = SINGLE,
) -> TaskResult:
    """The model's answers to `questions`, judged. Several `ranks` ask together, see `answer`."""
    predictions = answer(model, tokenizer, questions.task, questions.examples, how, ranks)
    figures = judge(questions.task, predictions, questions.examples)
    encoded = tokenizer.encode_batch([example.inputs for example in questions.examples])
    cut = sum(len(ids) >= how.input_length for ids in encoded)
    return TaskResult(questions, tuple(predictions), figures, cut)


def as_json(results: Sequence[TaskResult], how: DecodingConfig, model: str, command: str) -> dict:
    """Everything needed to know what was measured, and how to do it again."""
    return {
        "model": model,
        "command": command,
        "decode": how.decode,
        **(asdict(how.beams) if how.beams.beams > 1 else {}),
        "input_length": how.input_length,
        "max_length": how.max_length,
        "tasks": {result.name: result.about() for result in results},
        "averages": averages({result.name: result.score for result in results}),
    }


def as_table(results: Sequence[TaskResult]) -> str:
    """One line for each task, and one for each average that all tasks are there for."""
    wide = max(len("super_glue"), *(len(result.name) for result in results))
    lines = [f"{'task':<{wide}} {'split':<10} {'examples':>13} {'score':>7}  metrics"]
    for result in results:
        asked, total = len(result.predictions), result.questions.total
        number = f"{asked:,}" if asked == total else f"{asked:,} of {total:,}"
        figures = "  ".join(f"{name} {value:.2f}" for name, value in result.figures.items())
        cut = f"  ({result.cut:,} inputs cut)" if result.cut else ""
        if result.questions.unanswered:
            cut += f"  ({result.questions.unanswered:,} without a target left out)"
        lines.append(
            f"{result.name:<{wide}} {result.questions.split:<10} {number:>13} "
            f"{result.score:>7.2f}  {figures}{cut}"
        )
    for name, value in averages({result.name: result.score for result in results}).items():
        lines.append(f"{name:<{wide}} {'average':<10} {'':>13} {value:>7.2f}")
    return "\n".join(lines)


def write_predictions(path: Path, results: Iterable[TaskResult]) -> None:
    """One JSON object per line: the task, the input, every right answer and the model's."""
    with path.open("w", encoding="utf-8") as file:
        for result in results:
            pairs = zip(result.questions.examples, result.predictions, strict=True)
            for example, prediction in pairs:
                line = {
                    "task": result.name,
                    "inputs": example.inputs,
                    "answers": list(example.answers),
                    "prediction": prediction,
                }
                if example.label is not None:
                    line["label"] = example.label
                if example.group is not None:
                    line["group"] = example.group
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
