"""GLUE and SuperGLUE as in T5, with WNLI and DPR.

WSC and DPR are in T5's "simple" form: the pronoun stands between asterisks and the target is what
it refers to. In WSC's training only right referents are targets. In evaluation the target is the
candidate that the record asks about, right or not; an answer means "yes" if it names that candidate
(metric `referent`).
"""

import re
from collections.abc import Iterable, Iterator

import numpy as np

from switchworks.config import DataError
from switchworks.data.tasks.sources import Record
from switchworks.data.tasks.task import (
    UNKNOWN,
    Example,
    Task,
    classify,
    fields,
    hub_task,
    label_of,
    text_in,
    texts,
)

_GLUE, _SUPER_GLUE = "nyu-mll/glue", "aps/super_glue"
_DPR = "community-datasets/definite_pronoun_resolution"

NLI = ("entailment", "neutral", "contradiction")
TWO_WAY = ("entailment", "not_entailment")
TRUTH = ("False", "True")
_CHOICES, _QUESTIONS = ("choice1", "choice2"), ("question1", "question2")
_HYPOTHESIS, _PAIR = ("hypothesis", "premise"), ("sentence1", "sentence2")


def stsb(record: Record) -> Example:
    """A similarity from 0 to 5 as the nearest of 0.0, 0.2, ... 5.0; in float32, halves to even."""
    label = record["label"]
    fifths = np.round(np.float32(-1 if label in ("", None) else label) * np.float32(5))
    return Example(
        inputs=fields("stsb", record, _PAIR), target=UNKNOWN if fifths < 0 else f"{fifths / 5:.1f}"
    )


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


def _group(record: Record, *parts: str) -> str:
    """A key for the question of an answer: `idx` if there is one, else the texts themselves."""
    index = record.get("idx")
    if isinstance(index, dict):
        return " ".join(f"{part} {index[part]}" for part in parts)
    return " ".join(str(record[part]) for part in parts)


def wsc(record: Record) -> Example:
    """A record of SuperGLUE, whose target is the candidate that it asks about."""
    label = label_of(record, TRUTH)
    inputs = f"wsc: {_mark(record)}"
    if label == UNKNOWN:
        return Example(inputs=inputs, target=UNKNOWN)
    return Example(inputs=inputs, target=record["span1_text"], label=label == "True")


def wsc_training(record: Record) -> list[Example]:
    """The same if the candidate is what the pronoun means; nothing otherwise."""
    example = wsc(record)
    return [example] if example.label else []


def _mark(record: Record) -> str:
    """The text with asterisks around its pronoun, punctuation outside. In two records the pronoun
    is not separated from its punctuation, or is one word after the index."""
    pronoun, index = record["span2_text"], int(record["span2_index"])
    words = record["text"].split(" ")
    if words[index : index + 1] == [pronoun]:
        return " ".join([*words[:index], f"*{pronoun}*", *words[index + 1 :]])
    for position in (index, index + 1):
        word = words[position] if position < len(words) else ""
        rest = word.removeprefix(pronoun)
        if word.startswith(pronoun) and not rest[:1].isalnum():
            marked = [f"*{pronoun}*", *([rest] if rest else []), *words[position + 1 :]]
            return " ".join([*words[:position], *marked]).rstrip()
    raise DataError(
        f"WSC: word {index} of {record['text']!r} is not the pronoun {pronoun!r}.\n"
        "  span2_index counts the words between spaces, from 0."
    )


def dpr(record: Record) -> Example:
    """Definite pronoun resolution: the first place where the pronoun is a word of its own."""
    pronoun, candidates = record["pronoun"], texts(record, "candidates")
    sentence = re.sub(rf" ({pronoun})( |\.|,)", r" *\1*\2", record["sentence"], count=1)
    return Example(
        inputs=f"wsc: {sentence}", target=label_of(record, candidates), choices=candidates
    )


def _classifications(
    prefix: str, dataset: str, rows: Iterable[tuple[str, tuple[str, ...], tuple[str, ...], str]]
) -> Iterator[Task]:
    """Tasks of a benchmark from rows of (name, columns, labels, metrics)."""
    for name, columns, labels, metrics in rows:
        to_text, config = classify(name, columns, labels), f"{dataset}:{name}"
        yield hub_task(f"{prefix}_{name}", config, to_text, metrics=metrics, labels=labels)


_FIFTHS = tuple(f"{fifths / 5:.1f}" for fifths in range(26))
_MNLI = classify("mnli", _HYPOTHESIS, NLI)
_MULTIRC, _BOTH = f"{_SUPER_GLUE}:multirc", "f1_binary group_exact_match"

GLUE = (
    *_classifications(
        "glue",
        _GLUE,
        [
            ("cola", ("sentence",), ("unacceptable", "acceptable"), "matthews"),
            ("sst2", ("sentence",), ("negative", "positive"), "accuracy"),
            ("mrpc", _PAIR, ("not_equivalent", "equivalent"), "f1_binary accuracy"),
            ("qqp", _QUESTIONS, ("not_duplicate", "duplicate"), "f1_binary accuracy"),
            ("qnli", ("question", "sentence"), TWO_WAY, "accuracy"),
            ("rte", _PAIR, TWO_WAY, "accuracy"),
            ("wnli", _PAIR, ("not_entailment", "entailment"), "accuracy"),
        ],
    ),
    hub_task("glue_stsb", f"{_GLUE}:stsb", stsb, metrics="pearson spearman", labels=_FIFTHS),
    *(
        hub_task(name, f"{_GLUE}:mnli", _MNLI, splits=splits, folder="glue_mnli", labels=NLI)
        for name, splits in (
            ("glue_mnli", ("train", "validation_matched", "test_matched")),
            ("glue_mnli_mismatched", (None, "validation_mismatched", "test_mismatched")),
        )
    ),
)

SUPER_GLUE = (
    *_classifications(
        "super_glue",
        _SUPER_GLUE,
        [
            ("boolq", ("passage", "question"), TRUTH, "accuracy"),
            ("cb", _HYPOTHESIS, (NLI[0], NLI[2], NLI[1]), "f1_macro accuracy"),
            ("copa", (*_CHOICES, "premise", "question"), _CHOICES, "accuracy"),
            ("rte", _HYPOTHESIS, TWO_WAY, "accuracy"),
            ("wic", ("sentence1", "sentence2", "word"), TRUTH, "accuracy"),
        ],
    ),
    hub_task("super_glue_multirc", _MULTIRC, multirc, metrics=_BOTH, labels=TRUTH),
    *(
        hub_task(name, f"{_SUPER_GLUE}:{config}", judged, metrics=metric, training_text=training)
        for name, config, judged, metric, training in (
            ("super_glue_record", "record", record_judged, "squad_once", record_training),
            ("super_glue_wsc", "wsc.fixed", wsc, "referent", wsc_training),
        )
    ),
    hub_task("dpr", _DPR, dpr, splits=("train", None, "test")),
)
