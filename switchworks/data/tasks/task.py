"""A task: how a record of a dataset becomes text, and by which metrics answers are judged."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from switchworks.config import DataError
from switchworks.data.tasks.sources import SPLIT_NAMES, Hub, Record, Source

UNKNOWN = "<unk>"
"""The target of a record whose label is withheld, as in the test splits of GLUE."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One input and its target, with what judging an answer needs besides."""

    inputs: str
    target: str
    references: tuple[str, ...] = ()
    """Every right answer, where there are several."""
    group: str | None = None
    """Examples of one group are judged together (MultiRC) or count once (ReCoRD)."""
    choices: tuple[str, ...] = ()
    """The answers to choose from where they differ by example; else the task's labels are."""
    label: bool | None = None
    """Whether `target` is the right answer; only where it may be a wrong one (WSC)."""

    @property
    def answers(self) -> tuple[str, ...]:
        """Every right answer."""
        return self.references or (self.target,)


ToText = Callable[[Record], Example | Iterable[Example] | None]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task by name: data, text and metrics. See docs/tasks.md for how to write one."""

    name: str
    source: Source
    to_text: ToText
    """A record as one example or several; None or no example leaves it out."""
    metrics: tuple[str, ...] = ("accuracy",)
    """Names in `evaluate.metrics.METRICS`. A task's score is the mean of their figures."""
    labels: tuple[str, ...] = ()
    """The closed set of targets, in the order of the dataset's class numbers."""
    training_text: ToText | None = None
    """Another `to_text` to train on and to take the loss of, where it differs."""
    code: str = ""
    """The source of a user's task, an edit of which makes new tokens."""

    def examples(self, record: Record, split: str, *, judged: bool | None = None) -> list[Example]:
        """The examples of `record` of `split`: to judge answers by if `judged`, else to train on or
        to take the loss of. By default those of the train split are not judged, all others are.

        Raises DataError if a column is missing, if a value cannot be read, or if a target is not
        one of the labels.
        """
        training = split == "train" if judged is None else not judged
        to_text = self.training_text if training and self.training_text else self.to_text
        try:
            result = to_text(_Row(record))
            examples = [result] if isinstance(result, Example) else list(result or ())
            for example in examples:
                _check_texts(example)
        except _MissingColumnError as error:
            raise DataError(
                f"Task {self.name!r} needs a column {error.args[0]!r}, which the {split} data has "
                f"not. It has: {', '.join(record)}."
            ) from error
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"Task {self.name!r} cannot read a record of {split}: "
                f"{type(error).__name__}: {error}.\n  The record: {str(dict(record))[:300]}"
            ) from error
        for example in examples:
            if self.labels and example.target not in (*self.labels, UNKNOWN):
                raise DataError(
                    f"Task {self.name!r}: {example.target!r} is not one of its labels, "
                    f"{', '.join(self.labels)}.\n  Found with the input {example.inputs[:80]!r}."
                )
        return examples


def _check_texts(example: Example) -> None:
    """Raises TypeError if one of its texts is of another type."""
    for name in ("inputs", "target", "references", "choices"):
        value = getattr(example, name)
        for text in (value,) if name in ("inputs", "target") else value:
            if not isinstance(text, str):
                raise TypeError(f"{name}: {text!r} is no text")


class _MissingColumnError(KeyError):
    """The record has no such column; other KeyErrors have other causes."""


class _Row(dict[str, Any]):
    """A record that raises `_MissingColumnError` for a column it lacks."""

    def __missing__(self, column: str) -> Any:
        raise _MissingColumnError(column)


def text_in(record: Record, column: str) -> str:
    """The text of a column. Raises TypeError for null, which must not become the word "None", and
    for lists, dicts, bytes and NaN."""
    value = record[column]
    if value is None:
        raise TypeError(f"{column} is null")
    is_text = isinstance(value, str) or not isinstance(value, Collection)
    if not is_text or (isinstance(value, float) and not isfinite(value)):
        raise TypeError(f"{column} = {str(value)[:80]} is of the type {type(value).__name__}")
    return str(value)


def texts(record: Record, column: str) -> tuple[str, ...]:
    """The list of texts in a column. Raises DataError for anything else."""
    value = record[column]
    if isinstance(value, str) or not all(isinstance(item, str) for item in value):
        raise DataError(
            f"{column} = {str(value)[:80]!r} is not a list of texts.\n"
            "  CSV has no lists: make the table JSONL or Parquet."
        )
    return tuple(value)


def label_of(record: Record, labels: tuple[str, ...], column: str = "label") -> str:
    """The name of the record's label, given by number or name; `UNKNOWN` if it is withheld. Raises
    DataError for anything else."""
    value = record[column]
    if isinstance(value, bool):
        value = int(value)
    text = str(value).strip()
    if text in labels:
        return text
    if text in ("-1", "", "None"):
        return UNKNOWN
    if text.isdigit() and int(text) < len(labels):
        return labels[int(text)]
    raise DataError(
        f"{column} = {value!r} is not a label: neither one of {', '.join(labels)},\n"
        f"  nor their number from 0 to {len(labels) - 1}, nor -1 for unknown."
    )


def fields(name: str, record: Record, columns: Sequence[str]) -> str:
    """T5's general form: the task's name, then every column's name and text ("" for null)."""
    values = ("" if record[column] is None else text_in(record, column) for column in columns)
    return " ".join([name, *map("{}: {}".format, columns, values)])


def classify(name: str, columns: tuple[str, ...], labels: tuple[str, ...]) -> ToText:
    """T5's text for a classification: `fields` to the label's name."""

    def to_text(record: Record) -> Example:
        return Example(inputs=fields(name, record, columns), target=label_of(record, labels))

    return to_text


def hub_task(
    name: str,
    dataset: str,
    to_text: ToText,
    *,
    splits: tuple[str | None, str | None, str | None] = ("train", "validation", "test"),
    folder: str | None = None,
    metrics: str = "accuracy",
    **settings: Any,
) -> Task:
    """A task of DATASET or DATASET:CONFIG on the Hub, where the `splits` to train on, to validate
    and to test have these names; metrics are separated by spaces. The folder of a local copy has
    the task's name by default."""
    path, _, config = dataset.partition(":")
    names = {ours: theirs for ours, theirs in zip(SPLIT_NAMES, splits, strict=True) if theirs}
    source = Hub(dataset=path, config=config or None, folder=folder or name, names=names)
    return Task(
        name=name, source=source, to_text=to_text, metrics=tuple(metrics.split()), **settings
    )
