"""Files to documents: decompression, decoding and cutting, streamed. Errors name the file.

Every function takes one file and yields its documents in order, with no more than one document
and one block of the file in memory.
"""

import codecs
import json
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import zstandard

from switchworks.config import DataError
from switchworks.data.sources.text_source import Report

BLOCK_BYTES = 1 << 16
MAX_DOCUMENT_CHARACTERS = 1 << 16
"""A longer .txt file is cut into documents of at most this many characters."""

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")


def format_of(path: Path) -> str | None:
    """ ".txt", ".jsonl" or ".parquet", looking through .gz and .zst; None for other files."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def read_documents(path: Path, column: str, report: Report) -> Iterator[str]:
    """The documents of one file, in order, without empty ones; bad lines are counted in `report`.

    Raises DataError if the file cannot be read to its end.
    """
    kind = format_of(path)
    if kind == ".txt":
        documents = _cut(_characters(path))
    elif kind == ".jsonl":
        documents = _from_jsonl(path, column, report)
    else:
        documents = _from_parquet(path, column)
    return (document for document in documents if document.strip())


@runtime_checkable
class _Decompressor(Protocol):
    """The common interface of zlib's and zstandard's decompression objects."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def _blocks(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of `path`, in blocks. Raises DataError for a truncated file."""
    try:
        with path.open("rb") as file:
            blocks = iter(lambda: file.read(BLOCK_BYTES), b"")
            suffix = path.suffix.lower()
            yield from _decompressed(path, blocks) if suffix in COMPRESSIONS else blocks
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def _decompressed(path: Path, blocks: Iterator[bytes]) -> Iterator[bytes]:
    def new() -> _Decompressor:
        if path.suffix.lower() == ".gz":
            return zlib.decompressobj(wbits=31)
        return zstandard.ZstdDecompressor().decompressobj()

    decompressor, started = new(), False
    try:
        for block in blocks:
            while block:
                if decompressor.eof:  # files may be several compressed streams end to end
                    decompressor, started = new(), False
                    if path.suffix.lower() == ".gz" and not (block := block.lstrip(b"\0")):
                        break
                started = True
                yield decompressor.decompress(block)
                block = decompressor.unused_data if decompressor.eof else b""
    except (zlib.error, zstandard.ZstdError) as error:
        raise DataError(
            f"{path} is damaged, or is not what its name says: {error}.\n"
            "  Fetch or compress it again."
        ) from error
    if started and not decompressor.eof:
        raise DataError(f"{path} breaks off in the middle.\n  Fetch or compress it again.")


def _characters(path: Path) -> Iterator[str]:
    """The text of `path`, in blocks. Raises DataError for what is not UTF-8 text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of the first byte that is not decoded yet
    for block in chain(_blocks(path), [None]):  # None: the end, where no character may be open
        data = block or b""
        pending = len(decoder.getstate()[0])  # bytes of a character that the last block cut in two
        if b"\0" in data:
            raise DataError(
                f"{path} is binary, not text: byte {offset + pending + data.index(0)} is zero.\n"
                "  Give UTF-8 text; a UTF-16 file must be converted first."
            )
        try:
            text = decoder.decode(data, final=block is None)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8: byte {offset + error.start} is "
                f"0x{error.object[error.start]:02x} ({error.reason}).\n"
                f"  Convert it, for example: iconv -f latin1 -t utf-8 {path.name}"
            ) from error
        if offset == 0:
            text = text.removeprefix("\ufeff")
        offset += pending + len(data) - len(decoder.getstate()[0])
        if text:
            yield text


def _cut(blocks: Iterator[str]) -> Iterator[str]:
    """The text of `blocks` as one document, or as several of at most MAX_DOCUMENT_CHARACTERS.

    Cuts are made at the last blank line that fits, else at a line end, else at a space.
    """
    waiting = ""
    for block in blocks:
        waiting += block
        while len(waiting) > MAX_DOCUMENT_CHARACTERS:
            end = _cut_point(waiting)
            yield waiting[:end].strip("\n")
            waiting = waiting[end:]
    yield waiting.strip("\n")


def _cut_point(text: str) -> int:
    for border in ("\n\n", "\r\n\r\n", "\n", " "):
        position = text.rfind(border, 1, MAX_DOCUMENT_CHARACTERS)
        if position > 0:
            return position + len(border)
    return MAX_DOCUMENT_CHARACTERS


def read_lines(path: Path) -> Iterator[str]:
    """The lines of `path` without line ends. Raises DataError for what is not UTF-8 text."""
    pieces: list[str] = []  # of the line so far; joined once per line, however long it is
    for block in _characters(path):
        first, *rest = block.split("\n")
        pieces.append(first)
        for line in rest:
            yield "".join(pieces)
            pieces = [line]
    yield "".join(pieces)


def _from_jsonl(path: Path, column: str, report: Report) -> Iterator[str]:
    good = bad = 0
    keys: set[str] = set()
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        value = _json_text(line, column, keys)
        if isinstance(value, _Bad):
            bad += 1
            report.bad(path, number, value.reason)
        else:
            good += 1
            yield value
    if bad and not good:
        raise DataError(
            f"{path}: none of its {bad} lines can be used. First: {report.examples[0]}.\n"
            f"  Each line must be an object whose {column!r} is a string; keys found: "
            f"{', '.join(sorted(keys)) or 'none'}. Name another with --data.column."
        )


@dataclass(frozen=True)
class _Bad:
    reason: str


def _json_text(line: str, column: str, keys: set[str]) -> str | _Bad:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return _Bad("not JSON")
    if not isinstance(row, dict):
        return _Bad("not an object")
    if column not in row:
        if len(keys) < 20:
            keys.update(row)
        return _Bad(f"no key {column!r}")
    value = row[column]
    if not isinstance(value, str):
        return _Bad(f"{column!r} is not a string")
    # JSON can spell half a surrogate pair, which is no character and has no UTF-8.
    return value.encode("utf-8", "replace").decode("utf-8")


def _from_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryFile() as unpacked:
        source: Any = str(path)
        if path.suffix.lower() in COMPRESSIONS:
            for block in _blocks(path):
                unpacked.write(block)
            unpacked.seek(0)
            source = unpacked
        try:
            with pq.ParquetFile(source) as file:
                check_column(column, file.schema_arrow.names, str(path))
                kind = file.schema_arrow.field(column).type
                if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                    raise DataError(
                        f"{path}: column {column!r} holds {kind}, not text.\n"
                        "  Name a column of strings with --data.column."
                    )
                for batch in file.iter_batches(batch_size=256, columns=[column]):
                    yield from (value for value in batch.column(0).to_pylist() if value)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path} cannot be read as Parquet: {error}\n  Fetch or write it again."
            ) from error


def check_column(column: str, names: list[str], label: str) -> None:
    """Raises DataError, listing the columns there are, unless `column` is among `names`."""
    if column not in names:
        raise DataError(
            f"{label} has no column {column!r}. It has: {', '.join(names)}.\n"
            "  Name one with --data.column."
        )
