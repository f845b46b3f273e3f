"""What the cache is made of: files written completely or not at all, and hashes that name them."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


def atomic_write_text(path: Path, lines: Iterable[str]) -> None:
    """Write `lines` to `path`, never leaving half of them: a temporary file, synced and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def atomic_write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` to `path` as JSON, completely or not at all."""
    atomic_write_text(path, [json.dumps(values, indent=1)])


def digest(*values: Any) -> str:
    """Hexadecimal blake2b of `values`, anything that JSON or `str` can write."""
    text = json.dumps(values, default=str)
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()


def file_stats(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """(path, bytes, modification time) of each file: changes when the file may have changed."""
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold the lock of `path`, one process at a time; logs before it waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(path.name + ".lock"))
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        logging.getLogger(__name__).warning("waiting for the process that is making %s", path)
        held = lock.acquire()
    with held:
        yield
