"""Intervals over seeds, and by what factor one side needs fewer steps than the other."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple


class Interval(NamedTuple):
    """A mean over seeds with its 95 % confidence interval (Student's t); the ends are the mean
    itself for one seed, which has no spread."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        if self.count < 2:
            return f"{self.mean:.3g} (one seed)"
        return f"{self.mean:.3g} ({self.low:.3g} to {self.high:.3g})"


def interval(values: Sequence[float]) -> Interval:
    """Of at least one value."""
    from scipy.stats import t

    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Interval(mean, mean, mean, count)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def interval_of_factors(factors: Sequence[float]) -> Interval:
    """The geometric mean of factors, with the interval of their logarithms."""
    logarithms = interval([math.log(factor) for factor in factors])
    mean, low, high = (math.exp(value) for value in logarithms[:3])
    return Interval(mean, low, high, logarithms.count)


def steps_to(loss: float, losses: Mapping[int, float]) -> float | None:
    """How many steps a run needs to end at `loss`, interpolated in the logarithm of the steps
    between whole runs of the lengths in `losses`, ascending; None if it is outside of them."""
    points = list(losses.items())
    for (short, above), (long, below) in pairwise(points):
        if below <= loss <= above:
            share = (above - loss) / (above - below) if above > below else 0.0
            return math.exp((1 - share) * math.log(short) + share * math.log(long))
    return None


class Factor(NamedTuple):
    """How many times fewer steps than the reference; `bound` if it can only be said to be more."""

    value: float
    bound: bool


def fewer_steps(
    reference: Mapping[int, float], other: Mapping[int, float], steps: int
) -> Factor | None:
    """The factor by which `other` needs fewer steps to the loss of `reference` after `steps`. Both
    map lengths, ascending, to losses. None if `other` does not reach it within its lengths."""
    target = reference[steps]
    reached = steps_to(target, other)
    if reached is not None:
        return Factor(steps / reached, bound=False)
    first, loss = next(iter(other.items()))
    # Ahead after its shortest run: of runs as long as that, nothing is known.
    return Factor(steps / first, bound=True) if loss <= target and first < steps else None
