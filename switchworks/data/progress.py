"""Progress of a long build: a line every ten seconds, rewritten in place on a terminal."""

import sys
import time
from types import TracebackType

SECONDS_BETWEEN_LINES = 10.0


class BuildProgress:
    """Characters done out of `total` (None: not known), tokens, rate and time left."""

    def __init__(self, label: str, total: int | None, *, quiet: bool = False) -> None:
        self.label, self.total, self.quiet = label, total, quiet
        self.characters = self.tokens = 0
        self._in_place = sys.stdout.isatty()

    def __enter__(self) -> "BuildProgress":
        self._started = self._printed = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._in_place and self._printed != self._started:
            print()

    def advance(self, characters: int, tokens: int) -> None:
        """Count `characters` more as done, which gave `tokens` tokens."""
        self.characters += characters
        self.tokens += tokens
        now = time.monotonic()
        pause = 0.5 if self._in_place else SECONDS_BETWEEN_LINES
        if not self.quiet and now - self._printed >= pause:
            self._printed = now
            print(self.line(now), end="\r" if self._in_place else "\n", flush=True)

    def line(self, now: float) -> str:
        """The state at time `now` (of the monotonic clock) in one line."""
        seconds = max(now - self._started, 1e-3)
        line = f"{self.label}: {self.tokens / 1e6:.1f}M tokens"
        line += f", {self.tokens / seconds / 1e3:.0f}k/s"
        if self.total and 0 < self.characters <= self.total:
            left = seconds * (self.total - self.characters) / self.characters
            line += f", {100 * self.characters / self.total:.0f} %, {left:.0f} s left"
        return line
