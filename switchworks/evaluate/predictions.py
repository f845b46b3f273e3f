"""Answers to new inputs: labels with probabilities for classes, text for everything else.

`classify` takes texts, `predict` what a table, a file of lines or standard input holds, as
`switchworks predict` does. What is done is kept beside the output until all is, so an interrupted
call goes on where it was.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import exp, fsum
from pathlib import Path
from typing import Any

from switchworks import data
from switchworks.checkpoint import weights_hash
from switchworks.config import ConfigError, DataError, to_dict
from switchworks.disk import parse_json, whole_file
from switchworks.evaluate.answers import DecodingConfig, log_likelihoods, write
from switchworks.generate import GenerationConfig, load_with_tokenizer, write_texts
from switchworks.model import SwitchTransformer
from switchworks.progress import phase

CHUNK = 256
"""Inputs that are answered before their answers are kept."""

Answer = tuple[str, Mapping[str, float]]
"""The text, and of a class the probability of every label."""


def classify(
    model: SwitchTransformer,
    tokenizer: data.Tokenizer,
    texts: Sequence[str],
    labels: Sequence[str],
    config: DecodingConfig | None = None,
) -> list[dict[str, float]]:
    """Label -> probability of each text: that of the label as the whole answer, divided by the sum
    of all. Raises ConfigError without labels."""
    if not labels:
        raise ConfigError("There are no labels to choose from.\n  Name them: --labels no yes.")
    pairs = [(text, label) for text in texts for label in labels]
    nats = iter(log_likelihoods(model, tokenizer, pairs, config or DecodingConfig()))
    return [
        _probabilities(dict(zip(labels, islice(nats, len(labels)), strict=True))) for _ in texts
    ]


def _probabilities(nats: Mapping[str, float]) -> dict[str, float]:
    most = max(nats.values())
    weights = {label: exp(value - most) for label, value in nats.items()}
    total = fsum(weights.values())
    return {label: weight / total for label, weight in weights.items()}


@dataclass(frozen=True)
class Question:
    """What a run was trained to answer, as far as new inputs need it."""

    labels: tuple[str, ...] = ()
    column: str | None = None
    """Of its table, with the inputs."""
    to_text: Callable[[Mapping[str, Any]], str] | None = None
    """A record of a dataset that the program knows, as text."""
    input_length: int | None = None
    is_task: bool = True
    """False: holes are filled, or texts are continued."""


def question_of(path: Path, task: str | None = None, labels: Sequence[str] = ()) -> Question:
    """That of the task of the run in `path`, which has to be named if there are several. Outside of
    a run directory, and for a run without tasks, texts are filled or continued, unless there are
    `labels`. Raises ConfigError for a task that the run does not have."""
    settings = data.run_data_config(path)
    entries = {} if settings is None else {x.partition("=")[0]: x for x in settings.tasks}
    if task is None and len(entries) == 1:
        (task,) = entries
    if settings is None or not entries:
        return Question(tuple(labels), is_task=bool(labels))
    if task not in entries:
        raise ConfigError(
            f"--task {task} is none of the run's {len(entries)} tasks.\n"
            f"  Name one: --task {' or '.join(entries)}."
        )
    known = data.run_metadata(path).get("labels", {}).get(task, ())
    if "=" in entries[task]:  # the table itself may be gone
        columns = entries[task].partition("=")[2].split(":")[1:]
        names = tuple(labels or settings.task_labels or known)
        return Question(names, columns[0] if columns else None, None, settings.input_length)
    (source,) = data.find_tasks([entries[task]])

    def to_text(record: Mapping[str, Any]) -> str:
        examples = source.examples({"label": -1, **record}, "test")
        return examples[0].inputs if examples else ""

    return Question(tuple(labels) or source.labels or known, None, to_text, settings.input_length)


def answers(
    model: SwitchTransformer,
    tokenizer: data.Tokenizer,
    texts: Sequence[str],
    question: Question,
    config: GenerationConfig,
) -> list[Answer]:
    """The answer to each text; an empty text has an empty one."""
    given = [text for text in texts if text.strip()]
    decoding = DecodingConfig(**{**vars(config), "input_length": question.input_length})
    if question.labels:
        classes = classify(model, tokenizer, given, question.labels, decoding)
        made: Iterator[Answer] = ((max(x, key=x.__getitem__), x) for x in classes)
    elif question.is_task:
        made = ((text, {}) for text in write(model, tokenizer, given, decoding))
    else:
        made = ((text, {}) for text in write_texts(model, tokenizer, given, config))
    return [next(made) if text.strip() else ("", {}) for text in texts]


Row = tuple[Mapping[str, Any], str]
"""A record of the input, and the text that the model reads."""


def read_inputs(source: str, question: Question) -> Iterator[Row]:
    """The rows of PATH or PATH:COLUMN: a table, or a file with a text in each line; of "-" lines of
    standard input, or with :COLUMN JSON lines. Raises DataError if they cannot be read."""
    name, _, column = source.partition(":")
    if column and Path(source).exists():
        name, column = source, ""
    path = Path(name)
    if name == "-" and column:
        lines = (parse_json(line, "standard input") for line in sys.stdin if line.strip())
        yield from _with_text(lines, column, question, name)
    elif name == "-" or not data.is_table(path):
        for line in sys.stdin if name == "-" else _ended_lines(path):
            yield {"text": line.rstrip("\n")}, line.strip()
    else:
        yield from _with_text(data.read_tables([path]), column, question, name)


def _ended_lines(path: Path) -> Iterator[str]:
    """The lines of a file, of which the last, after the last line end, is none if it is empty."""
    before: str | None = None
    for line in data.read_lines(path):
        if before is not None:
            yield before
        before = line
    if before:
        yield before


def _with_text(
    records: Iterable[Mapping[str, Any]], column: str, question: Question, name: str
) -> Iterator[Row]:
    for record in records:
        if not column and question.to_text is not None:
            yield record, question.to_text(record)
            continue
        trained = question.column
        likely = [trained] if trained is not None and trained in record else list(record)
        known = column or likely[0]
        if known not in record or (not column and len(likely) > 1):
            raise DataError(
                f"{name} has the columns {', '.join(record)}"
                + (f", and not {column!r}.\n" if column else ".\n")
                + f"  Say which one to read: --input {name}:{next(iter(record))}."
            )
        yield record, data.text_in(record, known).strip()


def predict(
    path: Path,
    source: str,
    output: Path | None,
    config: GenerationConfig,
    *,
    task: str | None = None,
    labels: Sequence[str] = (),
    **weights: Any,
) -> int:
    """Answer the inputs in `source` (`read_inputs`) with the model in `path`; returns how many.

    `output` ends in .csv, .tsv or .jsonl, with the columns of the input, `prediction`, and of
    classes `probability` and a column for each label, or is plain lines, as standard output (None)
    is: the prediction, and of classes, after a tab, its probability. `weights` as for
    `load_with_tokenizer`. Raises ConfigError, DataError or CheckpointError.
    """
    question = question_of(path, task, labels)
    rows = read_inputs(source, question)
    kept = list(rows) if source.partition(":")[0] == "-" else None  # it can be read but once
    total = len(kept) if kept is not None else sum(1 for _ in rows)

    def again() -> Iterator[Row]:
        return iter(kept) if kept is not None else read_inputs(source, question)

    key = {"model": weights_hash(path), "settings": to_dict(config), "source": source}
    key |= {"question": [question.labels, question.input_length, question.is_task], "rows": total}
    partial = None if output is None or kept is not None else _partial_of(output)
    done = _Done(partial, json.loads(json.dumps(key, default=str)))
    if done.count < total:
        _answer_rest(path, again(), done, total, question, config, weights)
    _write(output, zip(again(), done.read(), strict=True), question.labels)
    done.forget()
    return total


def _answer_rest(
    path: Path,
    rows: Iterator[Row],
    done: "_Done",
    total: int,
    question: Question,
    config: GenerationConfig,
    weights: Mapping[str, Any],
) -> None:
    model, tokenizer = load_with_tokenizer(path, **weights)
    rows = islice(rows, done.count, None)
    with phase("answering", total - done.count) as shown:
        while chunk := [text for _, text in islice(rows, CHUNK)]:
            done.add(answers(model, tokenizer, chunk, question, config))
            shown.advance(len(chunk))


def _partial_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


class _Done:
    """Answers so far, in a file if there is one, whose first line says what they are answers to."""

    def __init__(self, file: Path | None, key: Mapping[str, Any]) -> None:
        self.file, self.key = file, key
        self._kept: list[Answer] = []
        if file is not None and file.exists():
            self._load(file)
        if file is not None and not self._kept:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(key) + "\n", encoding="utf-8")

    def _load(self, file: Path) -> None:
        whole = file.read_text(encoding="utf-8").split("\n")[:-1]  # the last may be cut
        if whole and parse_json(whole[0], str(file)) == self.key:
            self._kept = [tuple(json.loads(line)) for line in whole[1:]]  # type: ignore[misc]
            with file.open("w", encoding="utf-8") as again:
                again.writelines(f"{line}\n" for line in whole)

    @property
    def count(self) -> int:
        return len(self._kept)

    def add(self, made: Sequence[Answer]) -> None:
        self._kept += made
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in made)

    def read(self) -> Iterator[Answer]:
        return iter(self._kept)

    def forget(self) -> None:
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def _write(output: Path | None, pairs: Iterable[tuple[Row, Answer]], labels: Sequence[str]) -> None:
    if output is None:
        for _, (text, probabilities) in pairs:
            print(_line(text, probabilities))
        return
    with whole_file(output) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        if output.suffix in (".csv", ".tsv"):
            delimiter = "," if output.suffix == ".csv" else "\t"
            writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
            for number, ((record, _), answer) in enumerate(pairs):
                columns = {**record, **_columns(record, answer, labels)}
                if number == 0:
                    writer.writerow(columns)
                writer.writerow(columns.values())
        elif output.suffix == ".jsonl":
            for (record, _), answer in pairs:
                columns = {**record, **_columns(record, answer, labels)}
                file.write(json.dumps(columns, ensure_ascii=False, default=str) + "\n")
        else:
            file.writelines(f"{_line(*answer)}\n" for _, answer in pairs)


def _line(text: str, probabilities: Mapping[str, float]) -> str:
    text = " ".join(text.splitlines())
    return f"{text}\t{probabilities[text]:.4f}" if probabilities else text


def _columns(record: Mapping[str, Any], answer: Answer, labels: Sequence[str]) -> dict[str, Any]:
    text, probabilities = answer
    columns: dict[str, Any] = {"prediction": text}
    if labels:
        columns["probability"] = round(probabilities.get(text, 0.0), 6)
        columns |= {f"p({label})": round(probabilities.get(label, 0.0), 6) for label in labels}
    if taken := columns.keys() & record.keys():
        raise DataError(
            f"The input has a column {sorted(taken)[0]!r} already, where an answer would go.\n"
            "  Rename it there."
        )
    return columns
