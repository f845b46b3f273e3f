"""Attempts in a process of their own, one after the other, where none ends the drill.

Each has a number, from which it draws all that it does, so that it can be repeated alone. Where the
process dies or hangs, that attempt is lost and another process goes on with the next one.
"""

import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tally import Tally

Attempt = Callable[[int], tuple[str, str | None]]
"""From a number to how it ended, and what is wrong with that."""

GRACE = 10.0
"""Seconds after its limit at which a process that does not listen is killed."""
MEMORY = 4 << 30
"""Bytes that the attempts of a process may ask for beyond what it began with."""


class TooLong(BaseException):  # which nothing that is tried takes for an error of its own
    """The time is over."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Inside, TooLong is raised after `seconds`."""

    def stop(*_: Any) -> None:
        raise TooLong(f"took over {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def failure(error: BaseException) -> str:
    """The error, and the last place in the package that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if "/switchworks/" in frame.filename] or frames
    place = f"{Path(inside[-1].filename).name}:{inside[-1].lineno}"
    return f"{type(error).__name__} at {place}: {str(error)[:200]}"


def run_attempts(
    attempt: Attempt, numbers: range, tally: Tally, *, limit: float, seconds: float | None = None
) -> None:
    """Make the attempts with these numbers, each of at most `limit` seconds, and all of them, if
    that is given, of about `seconds`; count them in `tally`."""
    end = None if seconds is None else time.monotonic() + seconds
    first = numbers.start
    while first < numbers.stop and (end is None or time.monotonic() < end):
        for number, kind, lost in _of_one_process(attempt, numbers, first, limit, end):
            tally.add(kind, lost and f"#{number}: {lost}")
            first = number + 1
            if lost:
                print(f"  {tally.lost[-1]}", flush=True)
    print(tally.line(), flush=True)


def _of_one_process(
    attempt: Attempt, numbers: range, first: int, limit: float, end: float | None
) -> Iterator[tuple[int, str, str | None]]:
    """(number, how it ended, what is wrong) of each attempt from `first` on that one process makes;
    the last is the one in which it dies."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        status = 70
        try:
            _work(attempt, range(first, numbers.stop), writing, limit, end)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    number, reason = first, ""
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        waiting = b""
        while True:
            if not select.select([pipe], [], [], limit + GRACE)[0]:
                os.kill(pid, signal.SIGKILL)
                reason = f"does not end within {limit:g} s, nor listens"
                break
            data = pipe.read(1 << 16)
            if not data:
                break
            *lines, waiting = (waiting + data).split(b"\n")
            for line in lines:
                number, kind, lost = json.loads(line)
                yield number, kind, lost
                number += 1
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        yield number, "died", reason or f"the process ended with status {status}"


def _work(attempt: Attempt, numbers: range, pipe: int, limit: float, end: float | None) -> None:
    """Make the attempts without a word, and write how each ended to `pipe` as a line of JSON."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for number in numbers:
        if end is not None and time.monotonic() > end:
            break
        try:
            with time_limit(limit):
                kind, lost = attempt(number)
        except TooLong as error:
            kind, lost = "slow", str(error)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            kind, lost = "failed", failure(error)
        os.write(pipe, json.dumps([number, kind, lost]).encode() + b"\n")
