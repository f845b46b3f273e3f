"""A user's own task: a table with two columns, or a Python file that makes a `Task`.

--data.tasks reviews=reviews.csv:text:stars     columns text and stars
--data.tasks reviews=reviews.csv                its only two columns, in their order
--data.tasks reviews=folder:text:stars          folder/train.csv and folder/validation.csv
--data.tasks my_task.py                         the file's TASK
"""

import re
import runpy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from switchworks.config import ConfigError, DataError
from switchworks.data.cache import digest, file_stats
from switchworks.data.sources.reading import format_of
from switchworks.data.sources.text_source import is_validation
from switchworks.data.tasks import sources
from switchworks.data.tasks.task import Example, Task, text_in
from switchworks.trust import require_trusted


@dataclass(frozen=True)
class TableSource(sources.Source):
    """A table file, part of which is held out by a hash of its inputs, or a folder of splits.

    The split `all` of a file is both parts. Records have the columns `inputs` and `targets`,
    whatever the names in the table.
    """

    path: Path
    columns: tuple[str, str] | None
    """The columns for input and target. None: the table has exactly these two."""

    @property
    def splits(self) -> tuple[str, ...]:
        if self.path.is_file():
            return ("train", "validation", "all")
        return tuple(
            split for split in sources.SPLIT_NAMES if sources.tables_named(self.path, split)
        )

    def records(self, split: str, places: sources.Places) -> Iterator[sources.Record]:
        parted = self.path.is_file() and split != "all"
        source, target = self._column_names(places)
        for record in sources.read_tables(self._files(split), places.table):
            if missing := [name for name in (source, target) if name not in record]:
                raise DataError(
                    f"{self.path} has no column {missing[0]!r}. It has: {', '.join(record)}.\n"
                    "  Name input and target: NAME=PATH:INPUT:TARGET; if columns are not told "
                    "apart, set --data.task-delimiter."
                )
            inputs = str(record[source]).strip()
            held_out = parted and is_validation(inputs, places.validation_share)
            if parted and held_out != (split == "validation"):
                yield {}  # counts in the numbers of records, which are the table's
            else:
                yield {"inputs": record[source], "targets": record[target]}

    def fingerprint(self, split: str, places: sources.Places) -> str:
        stats = file_stats(self._files(split))
        return digest(stats, self._column_names(places), split, places.validation_share)

    def _files(self, split: str) -> list[Path]:
        return [self.path] if self.path.is_file() else sources.tables_named(self.path, split)

    def _column_names(self, places: sources.Places) -> tuple[str, str]:
        """The columns for input and target. If they are not named, the first row of the first split
        decides: in JSONL every row may have another order."""
        if self.columns is not None:
            return self.columns
        files = self._files(self.splits[0])
        rows = sources.read_tables(files, places.table)
        names = list(next(iter(rows), {"inputs": "", "targets": ""}))
        if len(names) != 2:
            raise DataError(
                f"{self.path} has {len(names)} columns: {', '.join(names)}.\n  Say which are "
                f"input and target, for example {self.path}:{names[0]}:{names[-1]}; if columns are "
                "not told apart, set --data.task-delimiter."
            )
        return names[0], names[1]


def pair(record: sources.Record) -> Example:
    """A table's row as it stands, without the space around its cells."""
    inputs, target = (text_in(record, column).strip() for column in ("inputs", "targets"))
    return Example(inputs=inputs, target=target)


def table_task(entry: str, *, metrics: tuple[str, ...], labels: tuple[str, ...]) -> Task:
    """The task that NAME=PATH or NAME=PATH:INPUT:TARGET names. Raises ConfigError for others."""
    name, _, rest = entry.partition("=")
    path, *columns = rest.split(":")
    if not re.fullmatch(r"[\w.-]+", name) or not path or len(columns) not in (0, 2):
        raise ConfigError(
            f"data.tasks has {entry!r}, which is neither a task nor NAME=PATH:INPUT:TARGET.\n"
            "  Example: reviews=reviews.csv:text:stars. Names have letters, digits, '.', '_', '-'."
        )
    file = Path(path).expanduser()
    if not (file.is_dir() or (file.is_file() and format_of(file, sources.TABLE_FORMATS))):
        problem = "is no table" if file.is_file() else "does not exist"
        raise ConfigError(
            f"data.tasks: {file} {problem}.\n  A task's examples are in a file that ends in "
            f"{', '.join(sources.TABLE_FORMATS)}, or in a folder with train.csv and the like."
        )
    source = TableSource(file, (columns[0], columns[1]) if columns else None)
    if not source.splits:
        raise ConfigError(
            f"data.tasks: the folder {file} has no train, validation or test that ends in "
            f"{', '.join(sources.TABLE_FORMATS)}.\n  Name its files after splits: train.csv."
        )
    return Task(name=name, source=source, to_text=pair, metrics=metrics, labels=labels)


def task_in_file(entry: str) -> Task:
    """The `TASK` of a Python file. Raises ConfigError if it cannot be run or has none, and for one
    that a run names, unless code is trusted."""
    path = Path(entry).expanduser()
    require_trusted(entry)
    if not path.is_file():
        raise ConfigError(f"data.tasks: {path} does not exist.\n  Name a file of Python.")
    try:
        task = runpy.run_path(str(path)).get("TASK")
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise ConfigError(
            f"data.tasks: {path} cannot be run: {type(error).__name__}: {error}.\n  Mend it."
        ) from error
    if not isinstance(task, Task):
        raise ConfigError(
            f"data.tasks: {path} defines no TASK, a switchworks.data.tasks.Task.\n"
            "  docs/tasks.md has an example of 20 lines."
        )
    return replace(task, code=path.read_text(encoding="utf-8"))


def task_fingerprint(task: Task, split: str, places: sources.Places) -> str:
    """Hexadecimal; changes when the examples of `task` may: by data, by code or by settings."""
    data = task.source.fingerprint(split, places)
    reading = places.table, places.skip_bad
    return digest(task.name, split, data, task.code, _package_code(), task.labels, reading)


@cache
def _package_code() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return "".join(path.read_text(encoding="utf-8") for path in files)
