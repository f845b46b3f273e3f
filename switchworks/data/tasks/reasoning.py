"""ANLI, ARC and Winogrande.

The paper does not print its text for these, and T5 does not have them. ANLI and Winogrande take
T5's general form (the task's name, then every field's name and text, in alphabetical order), ARC
lists its choices by their letters; the target is always the text of the answer.
"""

from switchworks.config import DataError
from switchworks.data.tasks.glue import NLI
from switchworks.data.tasks.sources import Hub, Record
from switchworks.data.tasks.task import UNKNOWN, Example, Task, classify, fields, text_in, texts


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


def _anli(number: int) -> Task:
    return Task(
        name=f"anli_r{number}",
        source=Hub(
            dataset="facebook/anli",
            folder="anli",
            names={
                "train": f"train_r{number}",
                "validation": f"dev_r{number}",
                "test": f"test_r{number}",
            },
        ),
        to_text=classify("anli", ("hypothesis", "premise"), NLI),
        labels=NLI,
    )


def _arc(name: str) -> Task:
    return Task(
        name=f"arc_{name.lower()}",
        source=Hub(dataset="allenai/ai2_arc", config=f"ARC-{name}", folder=f"arc_{name.lower()}"),
        to_text=arc,
    )


REASONING = (
    _anli(1),
    _anli(2),
    _anli(3),
    _arc("Easy"),
    _arc("Challenge"),
    Task(
        name="winogrande",
        source=Hub(dataset="allenai/winogrande", config="winogrande_xl", folder="winogrande"),
        to_text=winogrande,
    ),
)
