"""SQuAD with its passage, closed-book Natural Questions, WebQuestions and TriviaQA; ANLI, ARC and
Winogrande.

The closed-book tasks are those of Roberts et al. 2020, with 90 % of the training split to train on
and the rest to validate: as many as there, but in the Hub's order.
"""

import re
from functools import partial

from switchworks.config import DataError
from switchworks.data.tasks.glue import NLI
from switchworks.data.tasks.sources import Record
from switchworks.data.tasks.task import UNKNOWN, Example, classify, fields, hub_task, text_in, texts


def _squad(record: Record) -> Example:
    answers = tuple(_spaced(answer) for answer in texts(record["answers"], "text"))
    return Example(
        inputs=f"question: {_spaced(record['question'])} context: {_spaced(record['context'])}",
        target=answers[0] if answers else "",
        references=answers,
    )


def _spaced(text: str) -> str:
    """`text` with spaces around every mark; letters outside ASCII count as marks, as in T5. T5
    leaves a space at either end, which its tokenizer removes. Ours keeps spaces, so they are
    removed here."""
    return re.sub(r"[\t\n\f\r ]+", " ", re.sub(r"([^0-9A-Za-z_])", r" \1 ", text)).strip()


def closed_book(record: Record, name: str, column: str) -> Example:
    """The first of the answers in `column` is the target, any of them is right."""
    answers = texts(record, column)
    return Example(
        inputs=f"{name} question: {text_in(record, 'question')}",
        target=answers[0] if answers else "",
        references=answers,
    )


_nq = partial(closed_book, name="nq", column="answer")
_wq = partial(closed_book, name="wq", column="answers")


def _trivia_qa(record: Record) -> Example:
    """The answer's name is the target, any of its aliases is right."""
    answer = record["answer"]
    return Example(
        inputs=f"trivia_qa question: {text_in(record, 'question')}",
        target=answer["value"],
        references=texts(answer, "aliases"),
    )


def arc(record: Record) -> Example:
    """An exam question. Its choices have the dataset's letters or numbers."""
    letters, choices = (texts(record["choices"], column) for column in ("label", "text"))
    by_letter = dict(zip(letters, choices, strict=True))
    listed = " ".join(f"({letter}) {text}" for letter, text in by_letter.items())
    key = record["answerKey"]
    if key and key not in by_letter:
        raise DataError(f"answerKey = {key!r} is no choice.\n  Choices: {', '.join(letters)}.")
    return Example(
        inputs=f"arc question: {text_in(record, 'question')} choices: {listed}",
        target=by_letter[key] if key else UNKNOWN,
        choices=choices,
    )


def winogrande(record: Record) -> Example:
    """Which of two options replaces the underscore."""
    options = record["option1"], record["option2"]
    answer = str(record["answer"])
    return Example(
        inputs=fields("winogrande", record, ("option1", "option2", "sentence")),
        target=options[int(answer) - 1] if answer in ("1", "2") else UNKNOWN,
        choices=options,
    )


def _parts(first: int, test: str) -> tuple[str, str, str]:
    """The splits of a dataset of whose training split the `first` records are trained on."""
    return f"train[:{first}]", f"train[{first}:]", test


_NQ, _WQ = "google-research-datasets/nq_open", "stanfordnlp/web_questions"
_TRIVIA_QA = "mandarjoshi/trivia_qa:unfiltered.nocontext"

QUESTION_ANSWERING = tuple(
    hub_task(name, dataset, to_text, splits=splits, metrics=metric)
    for name, dataset, to_text, splits, metric in (
        ("squad", "rajpurkar/squad", _squad, ("train", "validation", None), "squad"),
        ("natural_questions", _NQ, _nq, _parts(79_168, "validation"), "squad"),
        ("web_questions", _WQ, _wq, _parts(3_417, "test"), "squad"),
        ("trivia_qa", _TRIVIA_QA, _trivia_qa, _parts(78_785, "validation"), "trivia_qa"),
    )
)

_ANLI = classify("anli", ("hypothesis", "premise"), NLI)

REASONING = (
    *(
        hub_task(
            f"anli_{number}",
            "facebook/anli",
            _ANLI,
            splits=(f"train_{number}", f"dev_{number}", f"test_{number}"),
            folder="anli",
            labels=NLI,
        )
        for number in ("r1", "r2", "r3")
    ),
    hub_task("arc_easy", "allenai/ai2_arc:ARC-Easy", arc),
    hub_task("arc_challenge", "allenai/ai2_arc:ARC-Challenge", arc),
    hub_task("winogrande", "allenai/winogrande:winogrande_xl", winogrande),
)
