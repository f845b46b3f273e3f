"""WMT from English into German, French and Romanian, as T5 has it."""

from functools import partial

from babel import Locale, UnknownLocaleError

from switchworks.data.tasks.sources import Hub, Record
from switchworks.data.tasks.task import Example, Task, one_text


def language_name(code: str) -> str:
    """The English name of a language or locale: de -> German, pt_BR -> Portuguese (Brazil).

    The code itself if nobody knows it.
    """
    try:
        return Locale.parse(code, sep="-" if "-" in code else "_").get_display_name("en") or code
    except (UnknownLocaleError, ValueError):
        return code


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
