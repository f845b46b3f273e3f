"""The cache: what names its files, hashes of what they are made of, the lock of one, and what there
is in it."""

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from switchworks.config import DataError
from switchworks.disk import read_sealed


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


@dataclass(frozen=True)
class CacheEntry:
    """A file or folder of the cache with its lock."""

    path: Path
    label: str
    """What it is, in words."""
    size: int
    """In bytes."""
    days: float
    """Since it was read or written."""
    is_leftover: bool
    """Whether a process that ended left it half-written."""


_KINDS = {
    "store": ("tokens of {}", "plan.json"),
    "tokenizer": ("tokenizer for {}", "made.json"),
    "task": ("tokens of the task {}", None),
    "python_docs": ("text of python_docs", None),
    "package_docs": ("text of package_docs", None),
    "catalogs": ("text of catalogs", None),
    "converted": ("a model of Hugging Face, converted", None),
}


def cache_entries(folder: Path) -> Iterator[CacheEntry]:
    """What is in the cache `folder`, without the locks of entries that are there."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in paths:
        if path.suffix == ".lock" and path.with_suffix("").exists():
            continue
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        stats = [file.stat() for file in files] or [path.stat()]
        used = max(max(stat.st_atime, stat.st_mtime) for stat in stats)
        days = max(0.0, time.time() - used) / 86400
        is_leftover = path.suffix in (".lock", ".tmp") and not _is_at_work(path)
        label = "leftover" if is_leftover else _label(path)
        yield CacheEntry(path, label, sum(stat.st_size for stat in stats), days, is_leftover)


def delete_entry(entry: CacheEntry) -> bool:
    """Delete an entry and its lock, unless a process that is making it holds that."""
    lock = FileLock(entry.path.with_name(entry.path.name.removesuffix(".lock") + ".lock"))
    try:
        with lock.acquire(timeout=0):
            if entry.path.is_dir():
                shutil.rmtree(entry.path)
            else:
                entry.path.unlink(missing_ok=True)
    except Timeout:
        return False
    Path(lock.lock_file).unlink(missing_ok=True)
    return True


def _is_at_work(path: Path) -> bool:
    """Whether the process whose number is in the name NAME.PID.tmp lives."""
    if (match := re.search(r"\.(\d+)\.tmp$", path.name)) is None:
        return False
    return Path("/proc", match[1]).exists()


def _label(path: Path) -> str:
    kind, _, rest = path.name.partition("-")
    text, about = _KINDS.get(kind, ("other", None))
    named = re.sub(r"-[0-9a-f]{16}$", "", rest)
    if about is not None:
        try:
            named = read_sealed(path / about).get("text", "some text")
        except (DataError, FileNotFoundError):
            named = "some text"
    return text.format(named)
