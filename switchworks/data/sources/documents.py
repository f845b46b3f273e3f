"""Where text comes from: own files, a Hugging Face dataset, or the embedded corpus.

`open_documents` names a source; its `documents(shard, num_shards)` streams one of `num_shards`
disjoint parts, the same part for the same arguments. Read `reading.py` for single files.
"""

import glob
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from switchworks.config import DataError
from switchworks.data.config import DataConfig
from switchworks.data.sources.catalogs.gettext import catalogs, split_sentences
from switchworks.data.sources.files import (
    COMPRESSIONS,
    FORMATS,
    Report,
    check_column,
    format_of,
    read_documents,
)
from switchworks.data.sources.python_docs import fingerprint as python_docs_fingerprint
from switchworks.data.sources.python_docs import python_docs


class Documents(ABC):
    """A source of text documents."""

    @abstractmethod
    def documents(
        self, shard: int = 0, num_shards: int = 1, *, report: Report | None = None
    ) -> Iterator[str]:
        """The documents of part `shard` of `num_shards`, streamed; none is empty.

        What was read and left out is counted in `report`. Raises DataError for bad input.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal; changes when the text may have changed."""

    @property
    def num_files(self) -> int:
        """How many parts can be read without reading the others, too."""
        return 1

    @property
    def num_characters(self) -> int | None:
        """About how many characters there are, for the time left; None if nobody knows."""
        return None

    def held_out(self) -> "Documents | None":
        """The source's own validation split, or None if it has none."""
        return None


@dataclass(frozen=True)
class Files(Documents):
    """The text files `paths`, in this order."""

    paths: tuple[Path, ...]
    column: str

    @property
    def num_files(self) -> int:
        return len(self.paths)

    @property
    def num_characters(self) -> int:
        # Compressed text is about a third of its length.
        return sum(
            path.stat().st_size * (3 if path.suffix in COMPRESSIONS else 1) for path in self.paths
        )

    def documents(
        self, shard: int = 0, num_shards: int = 1, *, report: Report | None = None
    ) -> Iterator[str]:
        report = Report() if report is None else report
        if len(self.paths) >= num_shards:
            for path in self.paths[shard::num_shards]:
                yield from read_documents(path, self.column, report)
        else:
            # Too few files to share out: everyone reads all of them and keeps every n-th document.
            whole = Report()
            everything = (d for p in self.paths for d in read_documents(p, self.column, whole))
            for document in islice(everything, shard, None, num_shards):
                report.documents += 1
                report.characters += len(document)
                yield document
            if shard == 0:  # one of the shards tells of the bad lines all of them saw
                report.merge(Report(bad_lines=whole.bad_lines, examples=whole.examples))

    def fingerprint(self) -> str:
        stats = [(str(path), path.stat()) for path in self.paths]
        return _hash([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats], self.column)


@dataclass(frozen=True)
class PythonDocs(Documents):
    """The embedded corpus, extracted into `cache` when first read."""

    cache: Path
    workers: int = 0

    @property
    def num_characters(self) -> int:
        return python_docs(self.cache, workers=self.workers).stat().st_size

    def documents(
        self, shard: int = 0, num_shards: int = 1, *, report: Report | None = None
    ) -> Iterator[str]:
        with python_docs(self.cache, workers=self.workers).open(encoding="utf-8") as file:
            for line in islice(file, shard, None, num_shards):
                document = json.loads(line)
                if report is not None:
                    report.documents += 1
                    report.characters += len(document)
                yield document

    def fingerprint(self) -> str:
        return _hash("python_docs", python_docs_fingerprint())


@dataclass(frozen=True)
class CatalogText(Documents):
    """The sentences of one language in the embedded corpus at `corpus`, each a document."""

    corpus: Path
    language: str
    validation_share: float
    side: Literal["train", "held_out"] = "train"

    @property
    def num_characters(self) -> int:
        return sum(map(len, self._texts()))

    def documents(
        self, shard: int = 0, num_shards: int = 1, *, report: Report | None = None
    ) -> Iterator[str]:
        for text in islice(self._texts(), shard, None, num_shards):
            if report is not None:
                report.documents += 1
                report.characters += len(text)
            yield text

    def fingerprint(self) -> str:
        return _hash(self.corpus.name, self.language, self.validation_share, self.side)

    def held_out(self) -> Documents | None:
        return replace(self, side="held_out") if self.side == "train" else None

    def _texts(self) -> dict[str, None]:
        """Without repetition: two English messages may say the same in another language."""
        split = split_sentences(self.corpus, self.validation_share)[self.language]
        return dict.fromkeys(sentence.text for sentence in getattr(split, self.side))


@dataclass(frozen=True)
class HubDataset(Documents):
    """A dataset that `datasets.load_dataset` opens: by its name on the Hub, or a local folder."""

    name: str
    config: str | None
    split: str
    validation_split: str | None
    column: str
    streaming: bool

    def documents(
        self, shard: int = 0, num_shards: int = 1, *, report: Report | None = None
    ) -> Iterator[str]:
        rows = self._open()
        if not self.streaming or rows.num_shards >= num_shards:
            rows = rows.shard(num_shards, shard, contiguous=False)
        else:
            rows = islice(rows, shard, None, num_shards)
        for row in rows:
            text = row[self.column]
            if isinstance(text, str) and text.strip():
                if report is not None:
                    report.documents += 1
                    report.characters += len(text)
                yield text

    def fingerprint(self) -> str:
        # A local folder is known by its files; of the Hub only the name is known beforehand.
        folder = Path(self.name)
        stats = [
            (str(path), path.stat().st_size, path.stat().st_mtime_ns)
            for path in (sorted(folder.rglob("*")) if folder.is_dir() else [])
            if path.is_file()
        ]
        return _hash(self.name, self.config, self.split, self.column, stats)

    def held_out(self) -> Documents | None:
        if self.validation_split is None:
            return None
        return HubDataset(
            self.name, self.config, self.validation_split, None, self.column, self.streaming
        )

    def _open(self) -> Any:
        import datasets

        named = f"dataset {self.name!r}, config {self.config!r}, split {self.split!r}"
        try:
            rows = datasets.load_dataset(
                self.name, self.config, split=self.split, streaming=self.streaming
            )
        # Whatever the library raises (many kinds, by source), the user can only change the name.
        except Exception as error:
            raise DataError(
                f"{named} cannot be opened: {error}\n  Check --data.dataset and "
                "--data.dataset-config, or the entry of --data.mixture, and --data.split."
            ) from error
        names = rows.column_names or list(next(iter(rows), {}))
        check_column(self.column, names, named)
        if not self.streaming:
            rows = rows.select_columns([self.column])
        return rows


@dataclass(frozen=True)
class First(Documents):
    """The first `most` documents of `source`, the same ones however many share them out."""

    source: Documents
    most: int

    def documents(
        self, shard: int = 0, num_shards: int = 1, *, report: Report | None = None
    ) -> Iterator[str]:
        first = islice(self.source.documents(), self.most)
        for document in islice(first, shard, None, num_shards):
            if report is not None:
                report.documents += 1
                report.characters += len(document)
            yield document

    def fingerprint(self) -> str:
        return _hash(self.source.fingerprint(), self.most)

    def held_out(self) -> Documents | None:
        held_out = self.source.held_out()
        return None if held_out is None else First(held_out, self.most)


class NoText(DataError):  # noqa: N818  it says what is wrong, as the others do
    """A file or folder is there and holds no text."""


def open_documents(config: DataConfig, cache: Path) -> Documents:
    """The source that `config` names, or the first of its documents if it says how many.

    `cache` is where the embedded corpus is kept. Raises DataError if there is no such file, NoText
    if it holds none.
    """
    source = _source(config, cache)
    return source if config.documents is None else First(source, config.documents)


def _source(config: DataConfig, cache: Path) -> Documents:
    if config.path is not None:
        return Files(tuple(find_files(config.path)), config.column)
    if config.source == "hub":
        assert config.dataset is not None  # DataConfig saw to it
        place = config.dataset  # which may be a folder
        return HubDataset(
            str(Path(place).expanduser()) if place.startswith("~") else place,
            config.dataset_config,
            config.split,
            config.validation_split,
            config.column,
            config.streaming,
        )
    if config.source == "catalogs":
        (language,) = config.languages  # one of those that `languages_of` tells apart
        return CatalogText(catalogs(cache), language, config.validation_share)
    return PythonDocs(cache, config.workers)


def find_files(pattern: str) -> list[Path]:
    """The text files that `pattern` (a file, folder or glob) names, sorted by path.

    Raises DataError if there is none, NoText if all of them are empty.
    """
    path = Path(pattern).expanduser()
    wanted = ", ".join(FORMATS) + f" (also {', '.join(COMPRESSIONS)})"
    if path.is_file():
        if format_of(path) is None:
            raise DataError(f"{path} is not a text file by its name.\n  Readable are {wanted}.")
        found = [path]
    elif path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and format_of(file))
        if not found:
            raise NoText(f"The folder {path} holds no text files.\n  Readable are {wanted}.")
    elif glob.has_magic(pattern):
        matches = map(Path, glob.glob(str(path), recursive=True))
        found = sorted(file for file in matches if file.is_file() and format_of(file))
        if not found:
            raise DataError(
                f"No text file matches {pattern!r}.\n  Readable are {wanted}; "
                "quote the pattern so that the shell leaves it alone."
            )
    else:
        raise DataError(f"{path} does not exist.\n  Text is named by a file, a folder or a glob.")
    if not any(file.stat().st_size for file in found):
        empty = "is empty" if len(found) == 1 else f"and {len(found) - 1} more are empty"
        raise NoText(f"There is no text to train on: {found[0]} {empty}.")
    return found


def is_validation(text: str, share: float) -> bool:
    """Whether the document `text` is held out: a fixed choice, true for `share` of all texts."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _hash(*values: Any) -> str:
    text = json.dumps(values, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
