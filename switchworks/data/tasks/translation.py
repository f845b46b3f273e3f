"""WMT from English into German, French and Romanian, as in T5; sentences of interfaces in many
languages, to translate or to name their language.

Those are of the embedded corpus `catalogs`, or of a folder `catalogs` among the local tasks, whose
records have a `language` (a code), the `english` sentence, and the `text`.
"""

import re
from collections.abc import Iterator
from functools import lru_cache, partial

from switchworks.data.sources.catalogs import gettext
from switchworks.data.sources.catalogs.languages import english_name
from switchworks.data.tasks.sources import Hub, Made, Places, Record
from switchworks.data.tasks.task import Example, Task, hub_task, text_in

FOLDER = Hub(dataset=None, folder="catalogs", names={"train": "train", "validation": "validation"})


@lru_cache(maxsize=1024)  # asked for every sentence
def language_name(code: str) -> str:
    """The English name of a language or locale: de -> German, pt_BR -> Portuguese (Brazil). For a
    locale that babel does not know, or of which it drops a part (ca-valencia), the result of
    `english_name`; for an unknown code the code itself."""
    from babel import Locale, UnknownLocaleError  # only languages need it

    try:
        locale = Locale.parse(code, sep="-" if "-" in code else "_")
    except (UnknownLocaleError, ValueError):
        return english_name(code)
    is_complete = len(str(locale).split("_")) >= len(re.split("[-_]", code))
    return (locale.get_display_name("en") if is_complete else None) or english_name(code)


def translate(record: Record, source: str, target: str) -> Example:
    """The Hub's records hold both languages in one column; plain tables have a column of each."""
    both = record.get("translation", record)
    prefix = f"translate {language_name(source)} to {language_name(target)}"
    return Example(inputs=f"{prefix}: {text_in(both, source)}", target=both[target])


def _sentences(split: str, places: Places) -> Iterator[Record]:
    if _has_folder(places):
        yield from FOLDER.records(split, places)
        return
    by_language = gettext.split_sentences(gettext.catalogs(places.cache), places.validation_share)
    for sentences in by_language.values():
        for item in getattr(sentences, split):
            yield {"language": item.language, "english": item.english, "text": item.text}


def _version(places: Places) -> str:
    """Identifies the user's files, or the embedded corpus and how much of it is held out."""
    if _has_folder(places):
        return " ".join(FOLDER.fingerprint(split, places) for split in FOLDER.splits)
    return f"{gettext.catalogs_fingerprint()} {places.validation_share}"


def _has_folder(places: Places) -> bool:
    return places.folder is not None and (places.folder / "catalogs").is_dir()


SOURCE = Made(_sentences, _version)


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


TRANSLATION = (
    *(
        hub_task(
            f"wmt_en_{language}",
            f"{dataset}:{language}-en",
            partial(translate, source="en", target=language),
            metrics="bleu",
        )
        for language, dataset in (("de", "wmt/wmt14"), ("fr", "wmt/wmt14"), ("ro", "wmt/wmt16"))
    ),
    Task(name="catalog_translation", source=SOURCE, to_text=both_ways, metrics=("chrf", "bleu")),
    Task(name="catalog_language", source=SOURCE, to_text=language),
)
