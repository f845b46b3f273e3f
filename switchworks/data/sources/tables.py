"""Table files to records: Parquet, JSONL, CSV and TSV. Errors name the file and the line."""

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from switchworks.config import DataError
from switchworks.data.sources.reading import (
    format_of,
    open_parquet,
    parse_json,
    read_lines,
    two_of_one_name,
    warn_once,
)

Record = Mapping[str, Any]
"""One row of a dataset: column name -> value."""

TABLE_FORMATS = (".parquet", ".jsonl", ".csv", ".tsv")
"""Table files that can be read, each also as .gz or .zst."""

_DELIMITERS = {".csv": ",;\t|", ".tsv": "\t"}
"""What may stand between the columns of a file with this suffix; the first is the usual one."""

Quoting = Literal["auto", "on", "off"]


@dataclass(frozen=True, kw_only=True)
class TableFormat:
    """How CSV and TSV files are written, as far as they do not tell themselves."""

    delimiter: str | None = None
    """Between the columns of the tables whose first line it splits."""
    quoting: Quoting = "auto"
    """Whether a quote at the beginning of a cell encloses it. "auto": in .csv, not in .tsv."""

    def is_quoted(self, kind: str) -> bool:
        """Whether cells of files with the suffix `kind` are quoted."""
        return self.quoting == "on" or (self.quoting == "auto" and kind == ".csv")


def is_table(path: Path) -> bool:
    """Whether `read_tables` reads files that are called like `path`."""
    return format_of(path, TABLE_FORMATS) is not None


def read_tables(paths: Iterable[Path], table: TableFormat = TableFormat()) -> Iterator[Record]:
    """The rows of table files, file after file. Raises DataError for what is not a table."""
    for path in paths:
        kind = format_of(path, TABLE_FORMATS)
        if kind == ".parquet":
            with open_parquet(path) as file:
                for batch in file.iter_batches(batch_size=1024):
                    yield from batch.to_pylist()
        elif kind == ".jsonl":
            yield from _jsonl(path)
        elif kind is not None:
            yield from _delimited(path, kind, table)
        else:
            raise DataError(f"{path} is no table. Readable are {', '.join(TABLE_FORMATS)}.")


def _jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            try:
                yield parse_json(line)
            except ValueError as error:
                raise DataError(
                    f"{path}:{number} is {error} ({error.__cause__ or line[:60]}).\n"
                    "  A line is a JSON object with the columns as keys."
                ) from error


def _delimited(path: Path, kind: str, table: TableFormat) -> Iterator[Record]:
    """Rows of CSV or TSV with every value as the file's text: 3.40 stays 3.40 and NA stays NA.
    Empty cells behind the last column are left out."""
    is_quoted = table.is_quoted(kind)
    delimiter = _delimiter(path, kind, table)
    rows = _quoted(path, delimiter) if is_quoted else _unquoted(path, delimiter)
    names = [name.strip() for name in next(rows, (0, []))[1]]
    while names and not names[-1]:
        names.pop()
    two_of_one_name(path, names)
    for number, row in rows:
        if any(cell.strip() for cell in row[len(names) :]) or len(row) < len(names):
            fix = f"Quote values that hold a {delimiter!r}."
            if not is_quoted:
                fix = f"In {kind} a quote is a character, unless: --data.task-quoting on."
            raise DataError(
                f"{path}:{number} has {len(row)} values for {len(names)} columns "
                f"({', '.join(names)}).\n  {fix}"
            )
        yield dict(zip(names, row, strict=False))


def _delimiter(path: Path, kind: str, table: TableFormat) -> str:
    """The character between the columns, by the first line. Raises DataError if several could be
    it and `table` does not say which."""
    head = next((line for line in read_lines(path) if line.strip()), "")
    is_quoted, given = table.is_quoted(kind), table.delimiter
    if given and _splits(head, given, is_quoted):
        return given
    possible = [mark for mark in _DELIMITERS[kind] if _splits(head, mark, is_quoted)]
    if len(possible) > 1:
        raise DataError(
            f"{path}: any of {' '.join(map(repr, possible))} could be between the columns "
            f"{head[:80]!r}.\n  Say which: --data.task-delimiter {possible[0]!r} "
            "(evaluate: --task-delimiter)."
        )
    return possible[0] if possible else _DELIMITERS[kind][0]


def _splits(head: str, delimiter: str, is_quoted: bool) -> bool:
    if not is_quoted:
        return delimiter in head
    try:
        return any(len(row) > 1 for row in csv.reader([head], delimiter=delimiter, strict=True))
    except csv.Error:
        return False


def _unquoted(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(number of its line, cells) of each row; a quote is a character."""
    enclosed = 0
    for number, line in enumerate(read_lines(path), start=1):
        if row := line.removesuffix("\r"):
            cells = row.split(delimiter)
            enclosed += any(cell[:1] == cell[-1:] == '"' != cell for cell in cells)
            yield number, cells
    if enclosed:
        warn_once(
            f"{path}: the quotes around cells of {enclosed} rows are read as characters. Where "
            "they enclose the cell: --data.task-quoting on (evaluate: --task-quoting)."
        )


def _quoted(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(number of its last line, cells) of each row, which a quoted line end may spread over several
    lines: how many is logged."""
    csv.field_size_limit(1 << 30)  # the default is shorter than some articles
    lines = (f"{line}\n" for line in read_lines(path))
    # strict: a quote that is never closed would swallow the rest of the file.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    read, spread = 0, list[int]()
    try:
        for row in reader:
            if reader.line_num > read + 1:
                spread.append(read + 1)
            read = reader.line_num
            if row:
                yield read, row
    except csv.Error as error:
        raise DataError(
            f"{path}:{read + 1} is not a row of a table: {error}.\n"
            "  A quote that opens a value has to be closed, and one inside is written twice. Where "
            "quotes are characters: --data.task-quoting off."
        ) from error
    if spread:
        warn_once(
            f"{path}: {len(spread)} rows are several lines long, the first from line {spread[0]}: "
            "a quote opens a cell there. Where quotes are characters: --data.task-quoting off "
            "(evaluate: --task-quoting)."
        )
