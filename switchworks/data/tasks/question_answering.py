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
    """`text` with spaces around every mark; letters outside ASCII count as marks, as in T5.

    T5 leaves a space at either end, which its tokenizer removes. Ours keeps spaces, so they are
    removed here.
    """
    return re.sub(r"[\t\n\f\r ]+", " ", re.sub(r"([^0-9A-Za-z_])", r" \1 ", text)).strip()


def closed_book(record: Record, name: str, column: str) -> Example:
    """The first of the answers in `column` is the target, any of them is right."""
    answers = texts(record, column)
    return Example(
        inputs=f"{name} question: {text_in(record, 'question')}",
        target=answers[0] if answers else "",
        references=answers,
    )


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
        raise DataError(f"answerKey = {key!r} is none of the choices, {', '.join(letters)}.")
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


def _split(first: int, test: str) -> dict[str, str]:
    return {"train": f"train[:{first}]", "validation": f"train[{first}:]", "test": test}


QUESTION_ANSWERING = (
    hub_task(
        "squad",
        "rajpurkar/squad",
        _squad,
        names={"train": "train", "validation": "validation"},
        metrics=("squad",),
    ),
    hub_task(
        "natural_questions",
        "google-research-datasets/nq_open",
        partial(closed_book, name="nq", column="answer"),
        names=_split(79_168, "validation"),
        metrics=("squad",),
    ),
    hub_task(
        "web_questions",
        "stanfordnlp/web_questions",
        partial(closed_book, name="wq", column="answers"),
        names=_split(3_417, "test"),
        metrics=("squad",),
    ),
    hub_task(
        "trivia_qa",
        "mandarjoshi/trivia_qa",
        _trivia_qa,
        config="unfiltered.nocontext",
        names=_split(78_785, "validation"),
        metrics=("trivia_qa",),
    ),
)

REASONING = (
    *(
        hub_task(
            f"anli_r{number}",
            "facebook/anli",
            classify("anli", ("hypothesis", "premise"), NLI),
            folder="anli",
            names={
                "train": f"train_r{number}",
                "validation": f"dev_r{number}",
                "test": f"test_r{number}",
            },
            labels=NLI,
        )
        for number in (1, 2, 3)
    ),
    hub_task("arc_easy", "allenai/ai2_arc", arc, config="ARC-Easy"),
    hub_task("arc_challenge", "allenai/ai2_arc", arc, config="ARC-Challenge"),
    hub_task("winogrande", "allenai/winogrande", winogrande, config="winogrande_xl"),
)
