"""Progress of a long build: a line every ten seconds."""

import time

SECONDS_BETWEEN_LINES = 10.0


class BuildProgress:
    """Characters done out of `total` (None: not known), tokens, rate and time left."""

    def __init__(self, label: str, total: int | None, *, quiet: bool = False) -> None:
        self.label, self.total, self.quiet = label, total, quiet
        self.characters = self.tokens = 0
        self._started = self._printed = time.monotonic()

    def advance(self, characters: int, tokens: int) -> None:
        """Count `characters` more as done, which gave `tokens` tokens."""
        self.characters += characters
        self.tokens += tokens
        now = time.monotonic()
        if not self.quiet and now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            print(self.line(now), flush=True)

    def line(self, now: float) -> str:
        """The state at time `now` (of the monotonic clock) in one line."""
        seconds = max(now - self._started, 1e-3)
        line = f"{self.label}: {self.tokens / 1e6:.1f}M tokens"
        line += f", {self.tokens / seconds / 1e3:.0f}k/s"
        if self.total and 0 < self.characters <= self.total:
            left = seconds * (self.total - self.characters) / self.characters
            line += f", {100 * self.characters / self.total:.0f} %, {left:.0f} s left"
        return line
