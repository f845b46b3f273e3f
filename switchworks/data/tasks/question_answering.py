"""Questions: SQuAD with its passage, and closed-book Natural Questions, WebQuestions, TriviaQA.

SQuAD is T5's. The closed-book tasks are those of Roberts et al. 2020, with 90 % of the training
split to train on and the rest to validate: as many as there, but in the Hub's order.
"""

import re

from switchworks.data.tasks.sources import Hub, Record
from switchworks.data.tasks.task import Example, Task, text_in, texts


def _squad(record: Record) -> Example:
    """Question, passage and answers with spaces around every punctuation mark."""
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


def natural_questions(record: Record) -> Example:
    """The first answer is the target, any of them is right."""
    return _closed_book("nq", record, texts(record, "answer"))


def web_questions(record: Record) -> Example:
    """The first answer is the target, any of them is right."""
    return _closed_book("wq", record, texts(record, "answers"))


def _trivia_qa(record: Record) -> Example:
    """The answer's name is the target, any of its aliases is right."""
    answer = record["answer"]
    return Example(
        inputs=f"trivia_qa question: {text_in(record, 'question')}",
        target=answer["value"],
        references=texts(answer, "aliases"),
    )


def _closed_book(name: str, record: Record, answers: tuple[str, ...]) -> Example:
    return Example(
        inputs=f"{name} question: {text_in(record, 'question')}",
        target=answers[0] if answers else "",
        references=answers,
    )


def _split(first: int, test: str) -> dict[str, str]:
    return {"train": f"train[:{first}]", "validation": f"train[{first}:]", "test": test}


QUESTION_ANSWERING = (
    Task(
        name="squad",
        source=Hub(
            dataset="rajpurkar/squad",
            folder="squad",
            names={"train": "train", "validation": "validation"},
        ),
        to_text=_squad,
        metrics=("squad",),
    ),
    Task(
        name="natural_questions",
        source=Hub(
            dataset="google-research-datasets/nq_open",
            folder="natural_questions",
            names=_split(79_168, "validation"),
        ),
        to_text=natural_questions,
        metrics=("squad",),
    ),
    Task(
        name="web_questions",
        source=Hub(
            dataset="stanfordnlp/web_questions", folder="web_questions", names=_split(3_417, "test")
        ),
        to_text=web_questions,
        metrics=("squad",),
    ),
    Task(
        name="trivia_qa",
        source=Hub(
            dataset="mandarjoshi/trivia_qa",
            config="unfiltered.nocontext",
            folder="trivia_qa",
            names=_split(78_785, "validation"),
        ),
        to_text=_trivia_qa,
        metrics=("trivia_qa",),
    ),
)
