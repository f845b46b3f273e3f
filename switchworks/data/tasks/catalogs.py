"""Interface sentences in many languages: translate them, or name their language.

Both read files catalogs/train.jsonl and catalogs/validation.jsonl (or .csv, .parquet) in the
folder of local tasks: records with a `language` (a code such as de or pt_BR), the `english`
sentence, and the `text` in that language.
"""

from switchworks.data.tasks.sources import Hub, Record
from switchworks.data.tasks.task import Example, Task
from switchworks.data.tasks.translation import language_name

SOURCE = Hub(
    dataset=None,
    folder="catalogs",
    names={"train": "train", "validation": "validation"},
)


def both_ways(record: Record) -> list[Example]:
    """From English and into English. English itself is not translated."""
    if record["language"] == "en":
        return []
    name = language_name(record["language"])
    english, text = record["english"], record["text"]
    return [
        Example(inputs=f"translate English to {name}: {english}", target=text),
        Example(inputs=f"translate {name} to English: {text}", target=english),
    ]


def language(record: Record) -> Example:
    """The English name of the sentence's language."""
    return Example(
        inputs=f"language of: {record['text']}", target=language_name(record["language"])
    )


TASKS = (
    Task(name="catalog_translation", source=SOURCE, to_text=both_ways, metrics=("chrf", "bleu")),
    Task(name="catalog_language", source=SOURCE, to_text=language),
)
