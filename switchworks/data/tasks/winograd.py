"""Whom a pronoun means: WSC, WNLI and DPR as T5 has them, which write the noun.

T5's "simple" form: the pronoun stands between asterisks and the target is what it refers to. In
training only right referents are targets. In judging the target is the candidate that the record
asks about, right or not; an answer says "yes" if it names that candidate (metric `referent`).
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from switchworks.config import DataError
from switchworks.data.tasks.sources import Hub, Record
from switchworks.data.tasks.task import UNKNOWN, Example, Task, label_of, texts

PREFIX = "wsc:"


def wsc(record: Record) -> Example:
    """SuperGLUE's record, with the span it asks about as target."""
    return _asked(_mark(record), record["span1_text"], label_of(record, ("False", "True")))


def _asked(text: str, candidate: str, label: str) -> Example:
    """Is `candidate` meant? Not known where the label is withheld."""
    if label == UNKNOWN:
        return Example(inputs=f"{PREFIX} {text}", target=UNKNOWN)
    return Example(
        inputs=f"{PREFIX} {text}", target=candidate, label=label in ("True", "entailment")
    )


def wsc_training(record: Record) -> list[Example]:
    """The same, if that span is what the pronoun means; nothing otherwise."""
    example = wsc(record)
    return [example] if example.label else []


def _mark(record: Record) -> str:
    """The text with asterisks around its pronoun, punctuation left outside.

    Two records have the pronoun glued to its punctuation, or one word after the index.
    """
    pronoun, index = record["span2_text"], int(record["span2_index"])
    words = record["text"].split(" ")
    if words[index : index + 1] == [pronoun]:
        return " ".join([*words[:index], f"*{pronoun}*", *words[index + 1 :]])
    for place in (index, index + 1):
        word = words[place] if place < len(words) else ""
        rest = word.removeprefix(pronoun)
        if word.startswith(pronoun) and not rest[:1].isalnum():
            marked = [f"*{pronoun}*", *([rest] if rest else []), *words[place + 1 :]]
            return " ".join([*words[:place], *marked]).rstrip()
    raise DataError(
        f"WSC: word {index} of {record['text']!r} is not the pronoun {pronoun!r}.\n"
        "  span2_index counts the words between spaces, from 0."
    )


def dpr(record: Record) -> Example:
    """Definite pronoun resolution: the first place where the pronoun is a word of its own."""
    pronoun, candidates = record["pronoun"], texts(record, "candidates")
    sentence = re.sub(rf" ({pronoun})( |\.|,)", r" *\1*\2", record["sentence"], count=1)
    return Example(
        inputs=f"{PREFIX} {sentence}",
        target=label_of(record, candidates),
        choices=candidates,
    )


PRONOUNS = frozenset({"he", "she", "they", "it", "her", "his", "their", "them", "him"})
ARTICLES = ("a", "an", "the")


def wnli(record: Record) -> Example:
    """GLUE's WNLI turned back into WSC: the candidate is what the second sentence has in place
    of a pronoun of the first."""
    premise, hypothesis = record["sentence1"], record["sentence2"]
    words, target = _plain(premise), _plain(hypothesis)
    matches = [_match(words, target, at) for at, word in enumerate(words) if word in PRONOUNS]
    if not matches:
        raise DataError(f"WNLI: there is no pronoun in {premise!r}.")
    best = max(matches, key=lambda match: match.score)  # the first of equals
    return _asked(
        _highlight(premise, best.place),
        _as_written(best.candidate, hypothesis),
        label_of(record, ("not_entailment", "entailment")),
    )


class _Match(NamedTuple):
    score: int
    place: int
    candidate: str


def _plain(sentence: str) -> list[str]:
    words = (re.sub(r"[.,?!]$", "", word) for word in sentence.strip().lower().split(" "))
    return [word for word in words if word]


def _match(premise: Sequence[str], hypothesis: Sequence[str], place: int) -> _Match:
    """How well the words around the pronoun at `place` are found in `hypothesis`, and what stands
    between them there."""
    before, after = list(premise[:place]), list(premise[place + 1 :])
    # T5 turns the order of the words around, not their letters.
    left = _longest_prefix(hypothesis[::-1], before[::-1])
    right = _longest_prefix(hypothesis, after)
    if left + right == 0:
        return _Match(0, place, "")
    left_words = [re.escape(word) for word in before[len(before) - left :]]
    right_words = [re.escape(word) for word in after[:right]]
    for pattern in (
        [*left_words, "(.+)", *right_words],
        ["^(.+)", *right_words],
        [*left_words, "(.+)$"],
    ):
        if found := re.search(" ".join(pattern), " ".join(hypothesis)):
            return _Match(left + right, place, found[1])
    return _Match(left + right, place, "")


def _longest_prefix(text: Sequence[str], words: Sequence[str]) -> int:
    """The most first `words` that stand in `text` one after the other."""
    joined = " ".join(text)
    for count in range(len(words)):
        if " ".join(words[: count + 1]) not in joined:
            return count
    return len(words)


def _highlight(sentence: str, place: int) -> str:
    words = sentence.split(" ")
    word = words[place]
    marked = f"*{word[:-1]}* {word[-1]}" if word[-1] in ".,!?" else f"*{word}*"
    return " ".join([*words[:place], marked, *words[place + 1 :]])


def _as_written(candidate: str, hypothesis: str) -> str:
    """`candidate` from its last article on, spelt as in `hypothesis`, not possessive."""
    words = candidate.split(" ")
    start = max(words.index(article) if article in words else 0 for article in ARTICLES)
    pattern = " ".join(rf"{re.escape(word)}(?:\.|,|\?|!)?" for word in words[start:])
    found = re.search(pattern, hypothesis, re.IGNORECASE)
    if found is None or not candidate:
        raise DataError(f"WNLI: {candidate!r} is not in {hypothesis!r}.")
    text = found[0].removesuffix(found[0][-1]) if found[0][-1] in ".,!?" else found[0]
    return text.removesuffix("'s") if text.endswith("'s") else text.removesuffix("'")


TASKS = (
    Task(
        name="super_glue_wsc",
        source=Hub(dataset="aps/super_glue", config="wsc.fixed", folder="super_glue_wsc"),
        to_text=wsc,
        training_text=wsc_training,
        metrics=("referent",),
    ),
    Task(
        name="glue_wnli_simple",
        source=Hub(
            dataset="nyu-mll/glue",
            config="wnli",
            folder="glue_wnli",
            names={"validation": "validation", "test": "test"},
        ),
        to_text=wnli,
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
