"""Files to documents: decompression, decoding and cutting, streamed. Errors name the file."""

import codecs
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from switchworks.config import DataError

BLOCK_BYTES = 1 << 16
MAX_DOCUMENT_CHARACTERS = 1 << 16
"""A longer .txt file is cut into documents of at most this many characters."""

MAX_ZSTD_WINDOW = 1 << 31
"""Bytes that unpacking a .zst file may keep: what `zstd --long=31`, its longest, asks for."""

MAX_RATIO, FREE_BYTES = 200, 1 << 26
"""A file may unpack to so many times its size, or to so many bytes; text compresses 3 to 20
times."""

MAX_LINE_CHARACTERS = 1 << 28
"""A longer line of a .jsonl file or a table is refused."""

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""The suffixes of compressed files, and pyarrow's names of their formats."""

warn_once = cache(logging.getLogger(__name__).warning)
"""Files may be read several times: to train a tokenizer, to be tokenised, and by every shard."""


def format_of(path: Path, formats: tuple[str, ...] = FORMATS) -> str | None:
    """The suffix of `path`, looking through .gz and .zst; None if it is not among `formats`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in formats else None


class UndecodableError(DataError):
    """A file is not text in the encoding it should have."""


def read_documents(path: Path, column: str, encoding: str = "utf-8") -> Iterator[str]:
    """The documents of one file, in order, without empty ones; bad lines are logged. Raises
    DataError if the file cannot be read to its end."""
    kind = format_of(path)
    if kind == ".txt":
        documents = _cut(characters(path, encoding))
    elif kind == ".jsonl":
        documents = _from_jsonl(path, column, encoding)
    else:
        documents = _from_parquet(path, column)
    return (document for document in documents if document.strip())


def _blocks(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of `path`, in blocks of at most BLOCK_BYTES. Raises DataError for a
    truncated file, and for one that unpacks to more than text does."""
    import zstandard

    try:
        most = max(FREE_BYTES, MAX_RATIO * path.stat().st_size)
        for block in _unpacked(path):
            most -= len(block)
            if most < 0:
                raise DataError(
                    f"{path} unpacks to more than {MAX_RATIO} times its size, which no text does.\n"
                    "  Unpack it yourself if it is meant to be read."
                )
            yield block
    except (OSError, zstandard.ZstdError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(
                f"{path} cannot be read: {error.strerror}.\n  Make it readable, or leave it out."
            ) from error
        problem = f"is damaged, or is not what its name says: {error}"
        if "Truncated" in str(error):
            problem = "breaks off in the middle"
        raise DataError(f"{path} {problem}.\n  Fetch or compress it again.") from error


def _unpacked(path: Path) -> Iterator[bytes]:
    import pyarrow as pa

    if path.suffix.lower() == ".zst":
        for data in _zstd_blocks(path):
            yield from (data[i : i + BLOCK_BYTES] for i in range(0, len(data), BLOCK_BYTES))
        return
    with pa.input_stream(str(path), COMPRESSIONS.get(path.suffix.lower())) as file:
        yield from iter(lambda: file.read(BLOCK_BYTES), b"")


def _zstd_blocks(path: Path) -> Iterator[bytes]:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
    frame = None
    with path.open("rb") as file:
        # Four bytes may stand for 128 KiB: of so little no more than 16 MiB come.
        while data := file.read(512):
            while data:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(data)
                data, frame = frame.unused_data, None if frame.eof else frame
    if frame is not None:
        raise OSError("Truncated frame")


def characters(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    """The text of `path`, in blocks. Raises UndecodableError for what is not text in `encoding`,
    DataError for what cannot be read."""
    decoder = codecs.getincrementaldecoder(encoding)()
    label = codecs.lookup(encoding).name.upper()
    offset = 0  # of the first byte that is not decoded yet
    for block in chain(_blocks(path), [None]):  # None: the end, where no character may be open
        data = block or b""
        pending = len(decoder.getstate()[0])  # bytes of a character that the last block cut in two
        if b"\0" in data and label == "UTF-8":
            raise UndecodableError(
                f"{path} is binary, not text: byte {offset + pending + data.index(0)} is zero.\n"
                "  Give text; of a UTF-16 file say --data.encoding utf-16."
            )
        try:
            text = decoder.decode(data, final=block is None)
        except UnicodeDecodeError as error:
            raise UndecodableError(
                f"{path} is not {label}: byte {offset + error.start} is "
                f"0x{error.object[error.start]:02x} ({error.reason}).\n"
                f"  Say --data.encoding, or convert it: iconv -f latin1 -t utf-8 {path.name}"
            ) from error
        if offset == 0:
            text = text.removeprefix("\ufeff")
        offset += pending + len(data) - len(decoder.getstate()[0])
        if text:
            yield text


def _cut(blocks: Iterator[str]) -> Iterator[str]:
    """The text of `blocks` as one document, or as several of at most MAX_DOCUMENT_CHARACTERS. Cuts
    are made at the last blank line that fits, else at a line end, else at a space."""
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


def read_lines(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    """The lines of `path` without line ends, which are CR in a file whose first is a lone CR, else
    LF. Raises DataError for what is not text in `encoding`."""
    pieces: list[str] = []  # of the line so far; joined once per line, however long it is
    end, length = None, 0
    for block in characters(path, encoding):
        end = end or re.search(r"\n|\r(?!\n|\Z)", block)
        first, *rest = block.split(end[0] if end else "\n")
        pieces.append(first)
        length += len(first)
        if length > MAX_LINE_CHARACTERS:
            raise DataError(
                f"{path} has a line of over {MAX_LINE_CHARACTERS:,} characters.\n  It is not what "
                "its name says, or lacks line ends."
            )
        for line in rest:
            yield "".join(pieces)
            pieces, length = [line], len(line)
    yield "".join(pieces)


def _from_jsonl(path: Path, column: str, encoding: str) -> Iterator[str]:
    bad: Counter[str] = Counter()  # lines, by reason
    first, keys, is_usable = "", set[str](), False
    for number, line in enumerate(read_lines(path, encoding), start=1):
        if not line.strip():
            continue
        try:
            text = _json_text(line, column, keys)
        except ValueError as reason:
            bad[str(reason)] += 1
            first = first or f"{path}:{number} ({reason})"
        else:
            is_usable = True
            yield text
    if bad and not is_usable:
        raise DataError(
            f"{path}: none of its {bad.total()} lines can be used. First: {first}.\n"
            f"  Each line must be an object whose {column!r} is a string; keys found: "
            f"{', '.join(sorted(keys)) or 'none'}. Name another with --data.column."
        )
    if bad:
        reasons = ", ".join(f"{count} {reason}" for reason, count in bad.items())
        warn_once(f"{bad.total()} lines were left out: {reasons}. First: {first}")


def _json_text(line: str, column: str, keys: set[str]) -> str:
    """The text in `line`. Raises ValueError with the reason if there is none; if the key is missing
    the first others are added to `keys`."""
    row = parse_json(line)
    if column not in row:
        if len(keys) < 20:
            keys.update(row)
        raise ValueError(f"no key {column!r}")
    if not isinstance(row[column], str):
        raise ValueError(f"{column!r} is not a string")
    return row[column]


def parse_json(line: str) -> dict[str, Any]:
    """The JSON object in `line`, with "?" for half of a surrogate pair (\\ud83d alone), in which
    truncated posts end and which has no UTF-8. Raises ValueError with what `line` is instead."""
    try:
        row = json.loads(line, object_pairs_hook=_columns)
    except KeyError as error:
        raise ValueError(f"an object with two keys {error}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError("not JSON") from error
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if "\\ud" in line.lower():
        return json.loads(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace"))
    return row


def _columns(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(name for name in names if names.count(name) > 1))
    return row


def _from_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa

    with open_parquet(path) as file:
        check_column(column, file.schema_arrow.names, str(path))
        kind = file.schema_arrow.field(column).type
        values = kind.value_type if pa.types.is_dictionary(kind) else kind
        if str(values) not in ("string", "large_string", "string_view"):
            raise DataError(
                f"{path}: column {column!r} holds {kind}, not text.\n"
                "  Name a column of strings with --data.column."
            )
        nulls = 0
        for batch in file.iter_batches(batch_size=256, columns=[column]):
            nulls += batch.column(0).null_count
            yield from (value for value in batch.column(0).to_pylist() if value)
    if nulls:
        warn_once(f"{path}: {nulls} records were left out: their {column!r} is null")


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """The `pyarrow.parquet.ParquetFile` at `path`. Raises DataError for what it cannot read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    is_compressed = path.suffix.lower() in COMPRESSIONS
    source = pa.BufferReader(b"".join(_blocks(path))) if is_compressed else path
    try:
        with pq.ParquetFile(source) as file:
            two_of_one_name(path, file.schema_arrow.names)
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet: {error}\n  Fetch or write it again."
        ) from error


def two_of_one_name(path: Path, names: list[str]) -> None:
    """Raises DataError if a name occurs twice among the columns of `path`."""
    if len(set(names)) < len(names):
        raise DataError(
            f"{path} has two columns of one name: {', '.join(names)}.\n  Rename or remove one."
        )


def check_column(column: str, names: list[str], label: str) -> None:
    """Raises DataError, listing the columns there are, unless `column` is among `names`."""
    if column not in names:
        raise DataError(
            f"{label} has no column {column!r}. It has: {', '.join(names)}.\n"
            "  Name one with --data.column."
        )
