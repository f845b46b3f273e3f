"""What long work says while it lasts: one live line on a terminal, a plain line now and then
elsewhere. On stderr, so that answers can go through a pipe."""

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

T = TypeVar("T")

PATIENCE = 3.0
"""Seconds that work may last without a word."""
SECONDS_BETWEEN_LINES = 15.0

_shown = threading.Lock()
"""Held by the outermost phase: what it calls has no line of its own."""


@runtime_checkable
class Phase(Protocol):
    """Work that is going on."""

    is_live: bool
    """Whether it has a line on a terminal that changes."""

    def advance(self, amount: float = 1) -> None:
        """So much more of the total is done."""

    def say(self, text: str) -> None:
        """Show `text` beside the label from now on."""


@contextmanager
def phase(label: str, total: float | None = None, *, lines: bool = True) -> Iterator[Phase]:
    """Inside, progress of work called `label` is shown, with the time left where its `total` is
    known. Within another phase, and on ranks other than the main one, nothing is; nor where there
    is no terminal if not `lines`.
    """
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    silent = os.environ.get("RANK", "0") != "0" or not (lines or on_terminal)
    if silent or not _shown.acquire(blocking=False):
        yield _Silent()
        return
    try:
        with _live(label, total) if on_terminal else _plain(label, total) as shown:
            yield shown
    finally:
        _shown.release()


def tracked(items: Iterable[T], label: str, total: float | None = None) -> Iterator[T]:
    """The same items, with the progress through them shown. `total`: their number."""
    with phase(label, total) as shown:
        for item in items:
            yield item
            shown.advance()


class _Silent:
    is_live = False

    def advance(self, amount: float = 1) -> None:
        pass

    def say(self, text: str) -> None:
        pass


class _Lines:
    """The first line after PATIENCE seconds, then one every SECONDS_BETWEEN_LINES; printed by a
    thread, for work that says nothing of itself."""

    is_live = False

    def __init__(self, label: str, total: float | None) -> None:
        self.label, self.total, self.text = label, total, ""
        self.done, self.started = 0.0, time.monotonic()

    def advance(self, amount: float = 1) -> None:
        self.done += amount

    def say(self, text: str) -> None:
        self.text = text

    def line(self) -> str:
        """The label, what was said, the share done, and the time so far and left."""
        seconds = time.monotonic() - self.started
        parts = [" ".join(filter(None, [self.label, self.text]))]
        if self.total and 0 < self.done <= self.total:
            share = self.done / self.total
            left = timedelta(seconds=round(seconds * (1 / share - 1)))
            parts += [f"{share:.0%}", f"{left} left"]
        else:
            parts.append(f"{timedelta(seconds=round(seconds))} so far")
        return ", ".join(parts)


@contextmanager
def _plain(label: str, total: float | None) -> Iterator[Phase]:
    shown, ended = _Lines(label, total), threading.Event()

    def print_lines() -> None:
        wait = PATIENCE
        while not ended.wait(wait):
            print(shown.line(), file=sys.stderr, flush=True)
            wait = SECONDS_BETWEEN_LINES

    thread = threading.Thread(target=print_lines, daemon=True, name=label)
    thread.start()
    try:
        yield shown
    finally:
        ended.set()
        thread.join()


class _Live:
    is_live = True

    def __init__(self, progress: "Progress", task: "TaskID") -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: float = 1) -> None:
        self._progress.advance(self._task, amount)

    def say(self, text: str) -> None:
        self._progress.update(self._task, text=text)


@contextmanager
def _live(label: str, total: float | None) -> Iterator[Phase]:
    """A bar that is gone when the work is done; what is printed meanwhile appears above it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (  # as many as fit into 80 characters
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=10),
        TaskProgressColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    console = Console(stderr=True)
    # Drawing takes a core's time from the work: twice a second is enough to see that it lives.
    with Progress(*columns, console=console, refresh_per_second=2, transient=True) as progress:
        yield _Live(progress, progress.add_task(label, total=total, text=""))
