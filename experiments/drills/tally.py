"""What a drill counts: how often something was tried, survived, and what was lost."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tally:
    """The outcome of one drill."""

    drill: str
    goal: str
    """What has to hold each time."""
    seed: int
    tried: int = 0
    lost: list[str] = field(default_factory=list)
    """A line for each time that it did not hold."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Outcomes by kind: refused, the same, killed, ..."""

    def add(self, kind: str, lost: str | None = None) -> None:
        """Count one more, which ended as `kind`; `lost` says what did not hold."""
        self.tried += 1
        self.kinds[kind] += 1
        if lost is not None:
            self.lost.append(lost)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with at most twenty of the losses."""
        return {
            "drill": self.drill,
            "goal": self.goal,
            "seed": self.seed,
            "tried": self.tried,
            "survived": self.tried - len(self.lost),
            "kinds": dict(self.kinds.most_common()),
            "lost": self.lost[:20],
        }

    def line(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common())
        return f"{self.drill}: {self.tried - len(self.lost)} of {self.tried} ({kinds})"
