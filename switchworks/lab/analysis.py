"""What results say: losses beside the first arm's, factors in steps and seconds, and verdicts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from switchworks.lab.results import losses
from switchworks.lab.statistics import Interval, fewer_steps, interval, interval_of_factors

ALIKE = 0.02
"""Nats per token within which two losses are called the same."""


@dataclass(frozen=True)
class Comparison:
    """One arm beside the first, the reference, over the seeds that both have."""

    arm: str
    loss: Interval
    """After the longest run that all of its seeds have finished."""
    steps: int
    gain: Interval | None
    """How far its loss is below the reference's, seed by seed; None without a common seed."""
    factors: dict[int, tuple[Interval, bool]]
    """Steps of the reference -> how many times fewer the arm needs to its loss. True: it is ahead
    after its shortest run already, so this is a lower bound."""
    per_second: float | None
    """Tokens per second beside the reference's, measured in turns; None if not measured."""
    expected: str | None

    @property
    def factor(self) -> tuple[Interval, bool] | None:
        """At the longest length of the reference that it reaches."""
        return self.factors[max(self.factors)] if self.factors else None

    def conclusion(self) -> str:
        """Whether this is what the paper found, in words."""
        if self.gain is None or self.expected is None:
            return ""
        if self.gain.count < 2:
            return "one seed: two more would say whether this is chance"
        holds = {
            "better": self.gain.low > 0,
            "worse": self.gain.high < 0,
            "the same": self.gain.low > -ALIKE and self.gain.high < ALIKE,
        }
        if holds[self.expected]:
            return "same direction as in the paper"
        if any(holds.values()):
            return f"different: {next(word for word, true in holds.items() if true)} here"
        return f"not measurable here: the spread of {self.gain.count} seeds is too large"


def compare(results: Mapping[str, Any]) -> list[Comparison]:
    """Every arm of `results` that has runs; the reference first, if it has any."""
    reference = losses(results, results["arms"][0]["name"])
    compared = (_compare(results, arm, reference) for arm in results["arms"])
    return [comparison for comparison in compared if comparison is not None]


def _compare(
    results: Mapping[str, Any], arm: Mapping[str, Any], reference: dict[int, dict[int, float]]
) -> Comparison | None:
    mine = losses(results, arm["name"])
    common = set.intersection(*(set(by_steps) for by_steps in mine.values())) if mine else set()
    if not common:
        return None
    steps, factors = max(common), {}
    pairs = [(reference[seed], mine[seed]) for seed in mine if seed in reference]
    is_reference = arm["name"] == results["arms"][0]["name"]
    gains = [theirs[steps] - ours[steps] for theirs, ours in pairs if steps in theirs]
    for length in [] if is_reference else results["steps"]:
        times = [fewer_steps(theirs, ours, length) for theirs, ours in pairs if length in theirs]
        reached = [factor for factor in times if factor is not None]
        if times and len(reached) == len(times):
            bound = any(factor.bound for factor in reached)
            factors[length] = interval_of_factors([f.value for f in reached]), bound
    speeds = results.get("tokens_per_second", {})
    names = arm["name"], results["arms"][0]["name"]
    known = all(name in speeds for name in names)
    return Comparison(
        arm=arm["name"],
        loss=interval([by_steps[steps] for by_steps in mine.values()]),
        steps=steps,
        gain=interval(gains) if gains and not is_reference else None,
        factors=factors,
        per_second=speeds[names[0]] / speeds[names[1]] if known else None,
        expected=arm.get("expected"),
    )
