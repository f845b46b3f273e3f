"""SuperGLUE as in T5: seven of its eight tasks. The eighth, WSC, is in winograd.py."""

import re

from switchworks.data.tasks.glue import TWO_WAY
from switchworks.data.tasks.sources import Hub, Record
from switchworks.data.tasks.task import (
    UNKNOWN,
    Example,
    Task,
    ToText,
    classify,
    fields,
    label_of,
    text_in,
    texts,
)

_DATASET = "aps/super_glue"

TRUTH = ("False", "True")


def multirc(record: Record) -> Example:
    """Whether an answer is right; the answers to one question are a group. HTML is removed."""
    text = fields("multirc", record, ("question", "answer", "paragraph"))
    text = re.sub("</?b>", "", text.replace("<br>", " "))
    return Example(
        inputs=text, target=label_of(record, TRUTH), group=_group(record, "paragraph", "question")
    )


def record_training(record: Record) -> list[Example]:
    """An example for every right answer."""
    text = _record_text(record)
    return [Example(inputs=text, target=answer) for answer in texts(record, "answers")]


def record_judged(record: Record) -> Example:
    """One example, for which any of the answers is right."""
    answers = texts(record, "answers")
    return Example(
        inputs=_record_text(record),
        target=answers[0] if answers else UNKNOWN,
        references=answers,
        group=_group(record, "passage", "query"),
        choices=_entities(record),
    )


def _record_text(record: Record) -> str:
    passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", record["passage"])
    passage = passage.replace("\n@highlight\n", ". ")
    entities = ", ".join(_entities(record))
    return f"record query: {text_in(record, 'query')} entities: {entities} passage: {passage}"


def _entities(record: Record) -> tuple[str, ...]:
    """Each once and sorted, as in the data T5 read; in the Hub's copy their order is arbitrary."""
    return tuple(sorted(set(texts(record, "entities"))))


def _group(record: Record, *parts: str) -> str | None:
    """A key for the question of an answer: `idx` if there is one, else the texts themselves."""
    index = record.get("idx")
    if isinstance(index, dict):
        return " ".join(f"{part} {index[part]}" for part in parts)
    return " ".join(str(record[part]) for part in parts)


def _task(
    name: str,
    to_text: ToText,
    *,
    labels: tuple[str, ...] = (),
    metrics: tuple[str, ...] = ("accuracy",),
    training_text: ToText | None = None,
) -> Task:
    full = f"super_glue_{name}"
    return Task(
        name=full,
        source=Hub(dataset=_DATASET, config=name, folder=full),
        to_text=to_text,
        metrics=metrics,
        labels=labels,
        training_text=training_text,
    )


def _classify(name: str, columns: tuple[str, ...], labels: tuple[str, ...], *metrics: str) -> Task:
    to_text = classify(name, columns, labels)
    return _task(name, to_text, labels=labels, metrics=metrics or ("accuracy",))


SUPER_GLUE = (
    _classify("boolq", ("passage", "question"), TRUTH),
    _classify(
        "cb",
        ("hypothesis", "premise"),
        ("entailment", "contradiction", "neutral"),
        "f1_macro",
        "accuracy",
    ),
    _classify("copa", ("choice1", "choice2", "premise", "question"), ("choice1", "choice2")),
    _task("multirc", multirc, labels=TRUTH, metrics=("f1_binary", "group_exact_match")),
    _task("record", record_judged, metrics=("squad_once",), training_text=record_training),
    _classify("rte", ("hypothesis", "premise"), TWO_WAY),
    _classify("wic", ("sentence1", "sentence2", "word"), TRUTH),
)
