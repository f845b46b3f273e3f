"""One corpus for each language: which there are, and the settings that read each."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from switchworks.config import DataError
from switchworks.data.config import DataConfig
from switchworks.data.sources.catalogs.gettext import catalogs, split_sentences
from switchworks.data.sources.catalogs.languages import MC4, english_name, mc4_code, normalise
from switchworks.data.sources.documents import NoText, open_documents
from switchworks.data.sources.files import format_of

ALL = "all"

LINE_CHARACTERS = 100
"""In a text file a line counts as one sentence, and a long one as one for so many characters."""

_C4_AND_MC4 = "allenai/c4"
_ENGLISH_OF_MC4 = "en-multi"
"""The config of mC4's English there, where "en" is C4's."""


def languages_of(config: DataConfig, cache: Path) -> dict[str, DataConfig]:
    """The settings of each language's own corpus, by its code.

    Languages too small to be used are named in the log, with the reason. Raises DataError for one
    that was asked for by name and is unknown, too small or not there.
    """
    if config.path is not None:
        found = _in_folder(config, Path(config.path).expanduser())
        return _chosen(config, found, lambda name: _lack_of_text(config, found[name], cache))
    if config.source == "hub":
        return _of_mc4(config)
    sentences = split_sentences(catalogs(cache), config.validation_share)

    def lack(name: str) -> str | None:
        split = sentences[name]
        if not (split.train and split.held_out):
            return "all its sentences would be on one side, to train on or held out"
        return _too_few(config, split.num_sentences)

    return _chosen(config, {n: replace(config, languages=(n,)) for n in sentences}, lack)


def names_languages(config: DataConfig) -> bool:
    """Whether `config` names its languages one by one: then each is used, or refused."""
    return bool(config.languages) and ALL not in config.languages


def unusable(name: str, lack: str) -> DataError:
    """For a language that was named, by its code, and why it cannot be used."""
    return DataError(f"{english_name(name)} ({name}) cannot be used: {lack}.")


def _chosen(
    config: DataConfig, found: dict[str, DataConfig], lack_of: Callable[[str], str | None]
) -> dict[str, DataConfig]:
    """Of the languages `found` those that `config` names, or all without a lack."""
    if names_languages(config):
        wanted = list(dict.fromkeys(map(normalise, config.languages)))
        for name in wanted:
            if name not in found:
                raise DataError(
                    f"There is no text in {english_name(name)} ({name}).\n"
                    f"  There is some in: {' '.join(sorted(found))}."
                )
            if (lack := lack_of(name)) is not None:
                raise unusable(name, lack)
        return {name: found[name] for name in wanted}
    kept = {}
    for name, own in found.items():
        if (lack := lack_of(name)) is None:
            kept[name] = own
        else:
            logging.getLogger(__name__).warning("%s is left out: %s", name, lack)
    if not kept:
        raise DataError(
            f"No language has {config.min_sentences} sentences.\n"
            "  Lower --data.min-sentences, or give more text."
        )
    return kept


def _too_few(config: DataConfig, sentences: int) -> str | None:
    if sentences >= config.min_sentences:
        return None
    return f"it has {sentences} sentences, fewer than data.min_sentences = {config.min_sentences}"


def _in_folder(config: DataConfig, root: Path) -> dict[str, DataConfig]:
    """What LANG/ and LANG.txt (.jsonl, .parquet, compressed) in `root` hold, by code."""
    if not root.is_dir():
        raise DataError(
            f"{root} is no folder.\n  With data.languages, data.path names one that holds LANG/ or "
            "LANG.txt for each language."
        )
    found: dict[str, Path] = {}
    for name, path in _named_by_language(root, strict=ALL in config.languages):
        if name in found:
            raise DataError(
                f"{found[name]} and {path} are the same language, {name}.\n"
                "  Put all of its text into one folder."
            )
        found[name] = path
    return {
        name: replace(config, languages=(), path=str(path)) for name, path in sorted(found.items())
    }


def _named_by_language(root: Path, *, strict: bool) -> Iterator[tuple[str, Path]]:
    for path in sorted(root.iterdir()):
        if path.name.startswith(".") or not (path.is_dir() or format_of(path)):
            continue
        name = path.name if path.is_dir() else path.name.partition(".")[0]
        try:
            yield normalise(name), path
        except DataError as error:
            if strict:
                raise DataError(f"{path}: {error}") from error


def _lack_of_text(config: DataConfig, own: DataConfig, cache: Path) -> str | None:
    """Why one language's files are too little; None if they are not, reading no more than tells."""
    try:
        documents = open_documents(own, cache)
    except NoText:
        return "it has no text"
    sentences = 0
    for document in documents.documents():
        for line in document.splitlines():
            sentences += max(bool(line.strip()), len(line) // LINE_CHARACTERS)
        if sentences >= config.min_sentences:
            return None
    return _too_few(config, sentences)


def _of_mc4(config: DataConfig) -> dict[str, DataConfig]:
    wanted = MC4 if ALL in config.languages else config.languages
    found: dict[str, DataConfig] = {}
    name_of: dict[str, str] = {}
    for name in dict.fromkeys(map(normalise, wanted)):
        code = mc4_code(name)
        if code is None:
            raise DataError(
                f"mC4 has no text in {english_name(name)} ({name}).\n  It has: {' '.join(MC4)}."
            )
        if code in name_of:
            raise DataError(
                f"{name_of[code]} and {name} are both {code} in mC4, which does not tell them "
                "apart.\n  Name one of them."
            )
        name_of[code] = name
        if code == "en":
            code = _ENGLISH_OF_MC4 if _has_c4(config.dataset or "") else code
        found[name] = replace(config, languages=(), dataset_config=code)
    return found


def _has_c4(dataset: str) -> bool:
    """Whether `dataset`, by its name or as a copy in a folder, has C4 beside mC4."""
    if dataset == _C4_AND_MC4:
        return True
    card = Path(dataset).expanduser() / "README.md"
    named = f"config_name: {_ENGLISH_OF_MC4}\n"
    return card.is_file() and named in card.read_text(encoding="utf-8")
