"""Timing two functions in turns, so that a machine that slows down slows both."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from switchworks.training import give_back_memory

Work = Callable[[], object]
"""A function to time; it returns when its result is computed."""


class Times(NamedTuple):
    """Seconds of each round, of both sides."""

    ours: list[float]
    peer: list[float]

    @property
    def medians(self) -> tuple[float, float]:
        """The median second of each side."""
        return statistics.median(self.ours), statistics.median(self.peer)

    def ratios(self) -> list[float]:
        """Ours over the peer's, round by round."""
        return [ours / peer for ours, peer in zip(self.ours, self.peer, strict=True)]


def seconds(work: Work) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def take_turns(ours: Work, peer: Work, rounds: int) -> Times:
    """Both once to warm up, then A B A B ... `rounds` times each."""
    for work in (ours, peer):
        work()
    times = Times([], [])
    for _ in range(rounds):
        times.ours.append(seconds(ours))
        times.peer.append(seconds(peer))
    return times


def alternate(build_ours: Callable[[], Work], build_peer: Callable[[], Work], rounds: int) -> Times:
    """As `take_turns`, for sides that do not fit in memory together.

    Each turn builds a side, calls it once to warm up and twice timed, and frees it.
    """
    times = Times([], [])
    for _ in range(-(-rounds // 2)):
        for build, taken in ((build_ours, times.ours), (build_peer, times.peer)):
            work = build()
            work()
            taken += [seconds(work), seconds(work)]
            del work
            give_back_memory()
    return times


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The quartiles of `values`; of fewer than four, the least and the largest."""
    if len(values) < 4:
        return min(values), max(values)
    quarters = statistics.quantiles(values, n=4, method="inclusive")
    return quarters[0], quarters[2]
