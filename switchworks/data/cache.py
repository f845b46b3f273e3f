"""What names the files of the cache, hashes of what they are made of, and the lock of one."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


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
