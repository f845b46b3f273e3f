"""WMT from English into German, French and Romanian, as T5 has it."""

import re
from functools import partial

from babel import Locale, UnknownLocaleError

from switchworks.data.sources.catalogs.languages import english_name
from switchworks.data.tasks.sources import Hub, Record
from switchworks.data.tasks.task import Example, Task, one_text


def language_name(code: str) -> str:
    """The English name of a language or locale: de -> German, pt_BR -> Portuguese (Brazil).

    A locale that Babel does not know, or would cut (ca-valencia), has the name of `english_name`:
    of a code that nobody knows that is the code itself.
    """
    try:
        found = Locale.parse(code, sep="-" if "-" in code else "_")
    except (UnknownLocaleError, ValueError):
        return english_name(code)
    whole = len(str(found).split("_")) >= len(re.split("[-_]", code))
    return (found.get_display_name("en") if whole else None) or english_name(code)


def translate(record: Record, source: str, target: str) -> Example:
    """The Hub's records hold both languages in one column; plain tables have a column of each."""
    both = record.get("translation", record)
    asked = f"translate {language_name(source)} to {language_name(target)}"
    return Example(inputs=f"{asked}: {one_text(both, source)}", target=both[target])


def _task(dataset: str, config: str, language: str) -> Task:
    return Task(
        name=f"wmt_en_{language}",
        source=Hub(dataset=dataset, config=config, folder=f"wmt_en_{language}"),
        to_text=partial(translate, source="en", target=language),
        metrics=("bleu",),
    )


TASKS = (
    _task("wmt/wmt14", "de-en", "de"),
    _task("wmt/wmt14", "fr-en", "fr"),
    _task("wmt/wmt16", "ro-en", "ro"),
)
