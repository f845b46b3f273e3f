"""How far a long build is: a bar on a terminal, a line every ten seconds elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Characters done out of `total` (None: nobody knows), tokens, rate and time left."""

    def __init__(self, what: str, total: int | None, *, quiet: bool = False) -> None:
        self.what, self.total, self.quiet = what, total, quiet
        self.characters = self.tokens = 0
        self._console = Console(stderr=True)
        self._bar: Bar | None = None
        if self._console.is_terminal and not quiet:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> "Progress":
        self._started = self._printed = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, characters: int, tokens: int) -> None:
        """So many more characters are done and gave so many tokens."""
        self.characters += characters
        self.tokens += tokens
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.characters, description=self.line(now))
        elif not self.quiet and now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            print(self.line(now), flush=True)

    def line(self, now: float) -> str:
        """The state at time `now` (of the monotonic clock) in one line."""
        seconds = max(now - self._started, 1e-3)
        line = f"{self.what}: {self.tokens / 1e6:.1f}M tokens"
        line += f", {self.tokens / seconds / 1e3:.0f}k/s"
        if self.total and 0 < self.characters <= self.total:
            left = seconds * (self.total - self.characters) / self.characters
            line += f", {100 * self.characters / self.total:.0f} %, {left:.0f} s left"
        return line
