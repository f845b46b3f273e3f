"""Which languages of a source are used: those named, or all that have enough text."""

import logging
from collections.abc import Callable, Mapping

from switchworks.config import DataError
from switchworks.data.sources.catalogs.languages import english_name, normalise
from switchworks.data.sources.text_source import TextConfig

ALL = "all"


def names_languages(config: TextConfig) -> bool:
    """Whether `config` names its languages one by one: then each is used, or refused."""
    return bool(config.languages) and ALL not in config.languages


def unusable(code: str, reason: str) -> DataError:
    """The error for a language that was named and cannot be used."""
    return DataError(f"{english_name(code)} ({code}) cannot be used: {reason}.")


def choose_languages(
    config: TextConfig, available: Mapping[str, TextConfig], lack_of: Callable[[str], str | None]
) -> dict[str, TextConfig]:
    """Of the languages `available` those that `config` names, or all with enough text.

    `lack_of(code)` says why a language has too little text, or None. Languages that are left out
    are logged with the reason. Raises DataError for a named one that is unknown or lacks text.
    """
    if names_languages(config):
        codes = list(dict.fromkeys(map(normalise, config.languages)))
        for code in codes:
            if code not in available:
                raise DataError(
                    f"There is no text in {english_name(code)} ({code}).\n"
                    f"  There is some in: {' '.join(sorted(available))}."
                )
            if (reason := lack_of(code)) is not None:
                raise unusable(code, reason)
        return {code: available[code] for code in codes}
    chosen = {}
    for code in available:
        if (reason := lack_of(code)) is None:
            chosen[code] = available[code]
        else:
            logging.getLogger(__name__).warning("%s is left out: %s", code, reason)
    if not chosen:
        raise DataError(
            f"No language has {config.min_sentences} sentences.\n"
            "  Lower --data.min-sentences, or give more text."
        )
    return chosen


def too_few(config: TextConfig, sentences: int) -> str | None:
    """Why `sentences` sentences are too few for a language; None if they are not."""
    if sentences >= config.min_sentences:
        return None
    return f"it has {sentences} sentences, fewer than data.min_sentences = {config.min_sentences}"
