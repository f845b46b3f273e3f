"""Files: written whole or not at all, and read with a bound. Read after `config.py`.

Everything that one file holds (settings, tables, pictures, pages) is written through `whole_file`;
directories are `checkpoint/files.py`'s. Whatever came from somebody else, a name or a value in a
file, passes `inside`, `read_json` or `read_text` before it is believed.
"""

import json
import logging
import os
import socket
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from pathlib import Path, PurePosixPath
from tokenize import TokenError  # which numpy raises for a header
from typing import Any

from switchworks.config import CheckpointError, ConfigError, DataError

MAX_BYTES = 1 << 28
"""Larger settings and listings are refused; the index of 2,048 experts in 15 layers has 12 MB."""

MAX_NAME = 255
"""Bytes of a file's name that file systems take."""

_SEAL = "seal"
"""The key of a hash over all other values, or all other lines."""
_SEAL_BYTES = len(f'{{"{_SEAL}": "{"0" * 32}"}}\n')
_BLOCK = 1 << 20
_MISFITS = TypeError, AttributeError, IndexError, OverflowError, RuntimeError, TokenError

_UMASK = os.umask(0)
os.umask(_UMASK)  # there is no way to read it without setting it


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a file beside `path` to write, which is `path` once the block has ended.

    If the block fails, or the disk is full, `path` is what it was. The file has the suffix of
    `path`, by which libraries choose a format. What killed processes left beside it is deleted. A
    pipe or a device, such as /dev/stdout, is written to directly.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    _clean(path)
    aside = path.with_name(f".{path.stem}.{_owner()}.tmp{path.suffix}")
    try:
        yield aside
        _flush(aside)
        open_to_all(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_text(path: Path, lines: Iterable[str]) -> None:
    """Write `lines`, which end as they end, to `path`, completely or not at all."""
    with whole_file(path) as aside, aside.open("w", encoding="utf-8") as file:
        file.writelines(lines)


def write_json(path: Path, values: Any) -> None:
    """Write `values` to `path` as readable JSON, completely or not at all. Floats keep all
    digits."""
    write_text(path, [json.dumps(values, indent=2), "\n"])


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """`write_json` with a hash of `values`, for what nobody edits."""
    write_json(path, values | {_SEAL: _hash(_canonical(values))})


def read_sealed(path: Path, error: type[ValueError] = DataError) -> dict[str, Any]:
    """What `write_sealed` wrote to `path`. Raises `error` as `read_json` does and if a value has
    changed since; FileNotFoundError if there is nothing."""
    values = read_json(path, error)
    if values.pop(_SEAL, None) != _hash(_canonical(values)):
        raise error(f"{path} is not what was written: its hash differs.\n  Delete it.")
    return values


def write_sealed_lines(path: Path, values: Iterable[Any]) -> None:
    """Write `values` to `path`, each as a line of JSON, and their hash as the last one."""
    digest = blake2b(digest_size=16)
    with whole_file(path) as aside, aside.open("wb") as file:
        for value in values:
            line = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
            digest.update(line)
            file.write(line)
        file.write(json.dumps({_SEAL: digest.hexdigest()}).encode() + b"\n")


def is_sealed(path: Path) -> bool:
    """Whether `path` is there and all of it is what `write_sealed_lines` wrote. Reads all of it,
    once for a file that does not change; a damaged one is named in the log."""
    try:
        info = path.stat()
    except FileNotFoundError:
        return False
    if whole := _is_sealed(path, info.st_size, info.st_mtime_ns):
        return whole
    logging.getLogger(__name__).warning("%s is damaged, and made again", path)
    return False


@lru_cache
def _is_sealed(path: Path, size: int, _changed: int) -> bool:
    digest = blake2b(digest_size=16)
    end = size - _SEAL_BYTES
    with path.open("rb") as file:
        for start in range(0, end, _BLOCK):
            digest.update(file.read(min(_BLOCK, end - start)))
        return end >= 0 and file.read() == json.dumps({_SEAL: digest.hexdigest()}).encode() + b"\n"


def read_sealed_lines(path: Path, first: int = 0, step: int = 1) -> Iterator[Any]:
    """The values that `write_sealed_lines` wrote to `path`, from the `first` on every `step`th."""
    with path.open(encoding="utf-8") as file:
        lines = (line for line in file if not line.startswith(f'{{"{_SEAL}"'))
        yield from map(json.loads, islice(lines, first, None, step))


def sealed_bytes(path: Path) -> int:
    """The size of what `write_sealed_lines` wrote to `path`, without the last line."""
    return path.stat().st_size - _SEAL_BYTES


def _canonical(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True).encode()


def _hash(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()


def read_text(path: Path, error: type[ValueError] = DataError, limit: int = MAX_BYTES) -> str:
    """The UTF-8 text of `path`. Raises `error`, naming `path`, if it is no ordinary file, larger
    than `limit` bytes, or no UTF-8; FileNotFoundError if there is nothing."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # to open a pipe is to wait for its writer
            raise error(f"{path} is no ordinary file.\n  Name a file.")
        if info.st_size > limit:
            raise error(
                f"{path} has {info.st_size:,} bytes; {limit:,} are read at most.\n"
                "  It is not what its name says, or damaged."
            )
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as cause:
        raise error(
            f"{path} cannot be read as UTF-8 text: {cause}.\n  Fetch or write it again."
        ) from cause
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror}.\n  Name another.") from cause


def read_json(path: Path, error: type[ValueError] = DataError) -> dict[str, Any]:
    """The JSON object in `path`. Raises `error`, naming `path`, as `read_text` does and if there is
    none; FileNotFoundError if there is nothing."""
    return parse_json(read_text(path, error), str(path), error)


def parse_json(
    text: str | bytes, label: str, error: type[ValueError] = DataError
) -> dict[str, Any]:
    """The JSON object that `text` is. Raises `error`, which names `label`, if it is none."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as cause:
        reason = "it is nested too deeply" if isinstance(cause, RecursionError) else cause
        raise error(f"{label} cannot be read: {reason}.\n  Fetch or write it again.") from cause
    if not isinstance(values, dict):
        raise error(f"{label} holds no JSON object.\n  Fetch or write it again.")
    return values


@contextmanager
def well_formed(label: str, error: type[ValueError], fix: str) -> Iterator[None]:
    """For a block that takes values out of a file: where one is missing, or of another type than
    it should be, `error` is raised, which names `label`."""
    try:
        yield
    except (ConfigError, DataError, CheckpointError):
        raise  # it says more
    except (ValueError, OSError) as cause:
        raise error(f"{label} cannot be read: {cause}.\n  {fix}") from cause
    except KeyError as cause:
        raise error(f"{label} has no {cause}.\n  {fix}") from cause
    except _MISFITS as cause:
        raise error(f"{label} is not laid out as it should be: {cause}.\n  {fix}") from cause


def inside(folder: Path, name: Any, label: str, error: type[ValueError] = DataError) -> Path:
    """The path of `name`, which the file `label` gives, inside `folder`. Raises `error` for a name
    that leads out of it: an absolute one, or one with "..". Links are followed wherever they were
    laid."""
    plain = isinstance(name, str) and name.isprintable() and bool(name)
    parts = PurePosixPath(name).parts if plain and len(name) <= MAX_NAME else ()
    if not parts or parts[0] == "/" or ".." in parts or "\\" in name:
        raise error(
            f"{label} names the file {str(name)[:200]!r}, which is not inside {folder}.\n"
            "  Only files inside it are read; do not use what comes from elsewhere with such names."
        )
    return folder / name


def open_to_all(path: Path) -> None:
    """Give `path` the mode that a plain `open` would have given it; some libraries are stricter."""
    path.chmod(0o666 & ~_UMASK)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _owner() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _clean(path: Path) -> None:
    """Delete what processes of this machine left beside `path` when they were killed."""
    begin, end = f".{path.stem}.{socket.gethostname()}-", f".tmp{path.suffix}"
    with suppress(OSError):
        for name in os.listdir(path.parent):
            pid = name.removeprefix(begin).removesuffix(end)
            if name == f"{begin}{pid}{end}" and pid.isdigit() and not _is_alive(int(pid)):
                (path.parent / name).unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
