"""One writer of a directory at a time. Read after `config.py`.

The lock is the kernel's (`flock`) on a file beside the directory: it ends with the process that
holds it, however that ends. Between machines it works where their file system passes locks on (NFS
from version 4 on); a file system without locks is used without one, with a warning.
"""

import fcntl
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from switchworks.config import ConfigError

_log = logging.getLogger(__name__)
_UNPROTECTED = (
    "%s is on a file system without locks (%s): nothing keeps two processes from writing to it "
    "at the same time"
)


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Inside, no other process is inside for the same `directory`, which need not exist.

    Raises ConfigError, naming the holder, if there is one. Not for use twice in one process.
    """
    path = _lock_of(directory)
    descriptor = _acquire(path, directory)
    try:
        yield
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)  # before the lock ends with the descriptor
            os.close(descriptor)


def holder_of(directory: Path) -> str | None:
    """Who is inside `only_writer` for `directory`, in words; None if nobody is. For an instant it
    shares the lock, so that a writer who comes just then is refused."""
    path = _lock_of(directory)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # it may be a pipe
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _name_in(path)
    except OSError:  # a file system without locks
        pass
    finally:
        os.close(descriptor)
    return None


def _lock_of(directory: Path) -> Path:
    place = directory.resolve()
    if not place.name:
        raise ConfigError(f"{directory} is the root of all folders.\n  Name one inside it.")
    return place.with_name(f".{place.name}.lock")


def _acquire(path: Path, directory: Path) -> int | None:
    """The open file that is locked; None where no file can be made or locked."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            return None  # whoever writes to the directory says why that cannot be
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ConfigError(
                f"{directory} is being written by {_name_in(path)}.\n"
                "  Wait for its end, or choose another place."
            ) from None
        except OSError as error:
            os.close(descriptor)
            _log.warning(_UNPROTECTED, directory, error.strerror)
            return None
        if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
            with suppress(OSError):  # no room: the lock holds without a name
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(_ourselves()).encode())
            return descriptor
        os.close(descriptor)  # its holder deleted the file after we had opened it


def _ourselves() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200],
    }


def _name_in(path: Path) -> str:
    """The holder, as the lock's file names it."""
    try:
        holder = json.loads(path.read_text("utf-8"))
        return "process {pid} on {host}, since {since} ({command})".format(**holder)
    except (OSError, ValueError, KeyError, TypeError):  # it has the lock and not yet written this
        return "another process"
