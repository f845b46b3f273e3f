"""Pronoun resolution: WSC and DPR as in T5, where the answer is the noun.

T5's "simple" form: the pronoun stands between asterisks and the target is what it refers to. In
training only right referents are targets. In evaluation the target is the candidate that the record
asks about, right or not; an answer means "yes" if it names that candidate (metric `referent`).
"""

import re

from switchworks.config import DataError
from switchworks.data.tasks.sources import Hub, Record
from switchworks.data.tasks.task import UNKNOWN, Example, Task, label_of, texts

PREFIX = "wsc:"


def wsc(record: Record) -> Example:
    """A record of SuperGLUE, whose target is the candidate that it asks about."""
    label = label_of(record, ("False", "True"))
    inputs = f"{PREFIX} {_mark(record)}"
    if label == UNKNOWN:
        return Example(inputs=inputs, target=UNKNOWN)
    return Example(inputs=inputs, target=record["span1_text"], label=label == "True")


def wsc_training(record: Record) -> list[Example]:
    """The same if the candidate is what the pronoun means; nothing otherwise."""
    example = wsc(record)
    return [example] if example.label else []


def _mark(record: Record) -> str:
    """The text with asterisks around its pronoun, punctuation outside.

    In two records the pronoun is not separated from its punctuation, or is one word after the
    index.
    """
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
        inputs=f"{PREFIX} {sentence}", target=label_of(record, candidates), choices=candidates
    )


WINOGRAD = (
    Task(
        name="super_glue_wsc",
        source=Hub(dataset="aps/super_glue", config="wsc.fixed", folder="super_glue_wsc"),
        to_text=wsc,
        training_text=wsc_training,
        metrics=("referent",),
    ),
    Task(
        name="dpr",
        source=Hub(
            dataset="community-datasets/definite_pronoun_resolution",
            folder="dpr",
            names={"train": "train", "test": "test"},
        ),
        to_text=dpr,
    ),
)
