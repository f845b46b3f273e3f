"""What a data source is: a class that opens text from settings and streams its documents.

To add one, subclass `TextSource` in a file of its own and enter it in `SOURCES` by name
(`switchworks.data.SOURCES["mine"] = Mine`); nothing else refers to sources by name.
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Self

from switchworks.config import ConfigError, DataError
from switchworks.data.cache import digest
from switchworks.data.sources.config import TextConfig


@dataclass
class Report:
    """What was read and what had to be left out, counted while documents are read."""

    documents: int = 0
    characters: int = 0
    bad_lines: dict[str, int] = field(default_factory=dict)
    """How many JSONL lines were left out, by reason."""
    examples: list[str] = field(default_factory=list)
    """file:line and reason of the first five."""

    @property
    def num_bad_lines(self) -> int:
        return sum(self.bad_lines.values())

    def bad(self, path: Path, line: int, reason: str) -> None:
        """Count line `line` (from 1) of `path` as left out because of `reason`."""
        self.bad_lines[reason] = self.bad_lines.get(reason, 0) + 1
        if len(self.examples) < 5:
            self.examples.append(f"{path}:{line} ({reason})")

    def merge(self, other: "Report") -> None:
        """Add the counts of `other` to this report."""
        self.documents += other.documents
        self.characters += other.characters
        for reason, count in other.bad_lines.items():
            self.bad_lines[reason] = self.bad_lines.get(reason, 0) + count
        self.examples = [*self.examples, *other.examples][:5]

    def log(self) -> None:
        """Log a warning about the lines that were left out, if any were."""
        if self.bad_lines:
            logging.getLogger(__name__).warning(
                "%d lines were left out: %s. First: %s",
                self.num_bad_lines,
                ", ".join(f"{count} {reason}" for reason, count in self.bad_lines.items()),
                "; ".join(self.examples),
            )


class NoText(DataError):  # noqa: N818  named like DataError's other kinds
    """A file or folder exists and holds no text."""


class TextSource(ABC):
    """A source of text documents. `open` makes one from the settings of a corpus."""

    settings: ClassVar[tuple[str, ...]] = ()
    """The fields of `TextConfig` that it reads besides `documents` and `validation_share`."""
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
    @abstractmethod
    def open(cls, config: TextConfig, cache: Path) -> Self:
        """The source that `config` describes; `cache` is a folder for what is derived from it.

        Raises DataError if there is no such text, NoText if it is empty.
        """

    @classmethod
    def language_configs(cls, config: TextConfig, cache: Path) -> "Mapping[str, TextConfig]":
        """The settings of each language's corpus by code. Only called if `check` let languages
        pass."""
        raise NotImplementedError

    @classmethod
    def mixture_settings(cls, argument: str) -> dict[str, Any]:
        """The fields that the entry NAME=SOURCE:`argument` of a mixture sets, besides `source`."""
        return {}

    @abstractmethod
    def documents(
        self, shard: int = 0, num_shards: int = 1, *, report: Report | None = None
    ) -> Iterator[str]:
        """Stream the documents of part `shard` of `num_shards`, disjoint parts that are the same at
        every call.

        Lines that are left out are counted in `report`. Raises DataError for bad input.
        """

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

    @classmethod
    def open(cls, config: TextConfig, cache: Path) -> Self:
        raise NotImplementedError("made by open_source from another source")

    def documents(
        self, shard: int = 0, num_shards: int = 1, *, report: Report | None = None
    ) -> Iterator[str]:
        first = islice(self.source.documents(report=None if shard else report), self.limit)
        yield from islice(first, shard, None, num_shards)

    def fingerprint(self) -> str:
        return digest(self.source.fingerprint(), self.limit)

    def validation(self) -> TextSource | None:
        validation = self.source.validation()
        return None if validation is None else FirstDocuments(validation, self.limit)


def is_validation(text: str, share: float) -> bool:
    """Whether the document `text` is for validation: decided by its hash, true for `share` of all
    texts, so that equal documents are on the same side in every run."""
    value = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(value, "big") < share * 2**64
