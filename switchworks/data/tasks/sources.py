"""Where a task's records come from: the Hugging Face Hub, or files with the same columns.

Local files take precedence: a folder named after the task (or after the source's `folder`) that
holds, for each split, one or more files named after it, such as validation_matched.jsonl or
train-00000-of-00001.parquet.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from switchworks.config import DataError
from switchworks.data.cache import digest, file_stats
from switchworks.data.sources.hub import hub_cache_if_offline
from switchworks.data.sources.reading import format_of
from switchworks.data.sources.tables import TABLE_FORMATS, Record, TableFormat, read_tables

SPLIT_NAMES = {"train": "train", "validation": "validation", "test": "test"}

_SLICE = re.compile(r"([\w.-]+)(?:\[(\d*):(\d*)\])?")


@dataclass(frozen=True)
class Places:
    """The folders of a task's data: the user's files, and the cache."""

    cache: Path
    folder: Path | None = None
    """One folder per task, with files of the dataset's own columns."""
    validation_share: float = 0.02
    """The share to hold out of a source without a validation split."""
    table: TableFormat = field(default_factory=TableFormat)
    skip_bad: bool = False
    """Leave out and count the records that cannot be read, in place of stopping at the first."""


class Source(ABC):
    """A dataset with named splits."""

    @property
    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        """The names of its splits: train, validation, test or some of them."""

    @abstractmethod
    def records(self, split: str, places: Places) -> Iterator[Record]:
        """The records of a split, in order; an empty one is left out, and counts in the numbers of
        the others. Raises DataError if they cannot be read."""

    @abstractmethod
    def fingerprint(self, split: str, places: Places) -> str:
        """Changes when the records may have changed."""


@dataclass(frozen=True, kw_only=True)
class Hub(Source):
    """A dataset on the Hub, or a local copy of it. `names` are the splits' names there. A name may
    end in a slice of numbers, as in "train[:79168]"."""

    dataset: str | None
    """None: it is not on the Hub and needs local files."""
    config: str | None = None
    folder: str
    """The name of a local copy's folder."""
    names: Mapping[str, str] = field(default_factory=lambda: SPLIT_NAMES)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.names)

    def records(self, split: str, places: Places) -> Iterator[Record]:
        base, start, stop = parse_slice(self.names[split])
        files = self._files(base, places)
        records = read_tables(files, places.table) if files else self._download(base)
        yield from islice(records, start, stop)

    def fingerprint(self, split: str, places: Places) -> str:
        files = self._files(parse_slice(self.names[split])[0], places)
        return digest(self.dataset, self.config, self.names[split], file_stats(files))

    def _files(self, base: str, places: Places) -> list[Path]:
        """The local files of a split; empty if there is no local copy of the dataset."""
        folder = None if places.folder is None else places.folder / self.folder
        if folder is None or not folder.is_dir():
            if self.dataset is not None:
                return []
            raise DataError(
                f"The data of {self.folder!r} needs a folder {folder or self.folder}.\n  Name the "
                f"one that holds {self.folder}/{base}.jsonl with --data.task-folder."
            )
        files = tables_named(folder, base)
        if not files:
            raise DataError(
                f"{folder} has no file for the split {base!r}.\n"
                f"  Needed is {base}.parquet, .jsonl, .csv or .tsv with the dataset's own columns."
            )
        return files

    def _download(self, base: str) -> Iterable[Record]:
        try:
            with hub_cache_if_offline():
                return self._load(base)
        # Whatever the library raises (many kinds, by cause), the user can do the same two things.
        except Exception as error:
            raise DataError(
                f"{self.dataset!r} ({self.config}, {base}) cannot be read from the Hub: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}\n"
                f"  Without a network, put a copy into a folder FOLDER/{self.folder}/ as "
                f"{base}.parquet, .jsonl, .csv or .tsv\n  and name it: --data.task-folder FOLDER "
                "(evaluate: --task-folder)."
            ) from error

    def _load(self, base: str) -> Iterable[Record]:
        import datasets

        assert self.dataset is not None  # _files saw to it
        try:
            return datasets.load_dataset(self.dataset, self.config, split=base)  # type: ignore
        except RuntimeError as error:
            # Datasets that still are scripts have a copy as tables, made by the Hub.
            if "scripts are no longer supported" not in str(error):
                raise
            return datasets.load_dataset(  # type: ignore[return-value]
                self.dataset, self.config, split=base, revision="refs/convert/parquet"
            )


@dataclass(frozen=True)
class Made(Source):
    """Records that a function makes on this machine: `make(split, places)`."""

    make: Callable[[str, Places], Iterable[Record]]
    version: Callable[[Places], str]
    """A text that changes when the records may have changed."""

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "validation")

    def records(self, split: str, places: Places) -> Iterator[Record]:
        yield from self.make(split, places)

    def fingerprint(self, split: str, places: Places) -> str:
        return digest(split, self.version(places))


def parse_slice(name: str) -> tuple[str, int, int | None]:
    """(split, start, stop) of a name such as train, train[:5] or train[5:]."""
    match = _SLICE.fullmatch(name)
    if match is None:
        raise DataError(f"{name!r} is not a split. Examples: train, train[:500], train[500:].")
    start, stop = match[2], match[3]
    return match[1], int(start or 0), int(stop) if stop else None


def tables_named(folder: Path, split: str) -> list[Path]:
    """The table files of `folder` that hold `split`: SPLIT.csv, or SPLIT-00000-of-00002.parquet.

    Raises DataError if they are not one file or the numbered parts of one, as a table and its
    conversion are not: then records would be read twice.
    """
    tables = [
        path
        for path in sorted(folder.iterdir())
        if format_of(path, TABLE_FORMATS)
        and re.fullmatch(rf"{re.escape(split)}(-\d.*)?", _stem(path))
    ]
    suffixes = {path.name[len(_stem(path)) :].lower() for path in tables}
    single = any(_stem(path) == split for path in tables)
    if len(suffixes) > 1 or (single and len(tables) > 1):
        names = ", ".join(path.name for path in tables)
        raise DataError(
            f"{folder} has the split {split!r} more than once: {names}.\n"
            "  Keep one file, or its numbered parts, and take the others out of the folder."
        )
    return tables


def _stem(path: Path) -> str:
    kind = format_of(path, TABLE_FORMATS)
    assert kind is not None
    return path.name[: path.name.lower().rindex(kind)]
