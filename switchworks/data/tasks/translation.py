"""WMT from English into German, French and Romanian, as in T5."""

import re
from functools import partial

from switchworks.data.sources.catalogs.languages import english_name
from switchworks.data.tasks.sources import Hub, Record
from switchworks.data.tasks.task import Example, Task, text_in


def language_name(code: str) -> str:
    """The English name of a language or locale: de -> German, pt_BR -> Portuguese (Brazil).

    For a locale that babel does not know, or of which it drops a part (ca-valencia), the result of
    `english_name`; for an unknown code the code itself.
    """
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


def _task(dataset: str, config: str, language: str) -> Task:
    return Task(
        name=f"wmt_en_{language}",
        source=Hub(dataset=dataset, config=config, folder=f"wmt_en_{language}"),
        to_text=partial(translate, source="en", target=language),
        metrics=("bleu",),
    )


TRANSLATION = (
    _task("wmt/wmt14", "de-en", "de"),
    _task("wmt/wmt14", "fr-en", "fr"),
    _task("wmt/wmt16", "ro-en", "ro"),
)
