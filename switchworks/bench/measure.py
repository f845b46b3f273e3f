"""From comparisons to rows: builds both sides, times them in turns, and takes medians."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from switchworks.bench.config import BenchConfig, Comparison, Precision, Workload
from switchworks.bench.memory import available_bytes, peak_memory
from switchworks.bench.peers import Work
from switchworks.bench.workloads import build, bytes_needed
from switchworks.device import compute_device, seconds, take_turns
from switchworks.model import training_flops_per_token
from switchworks.training import give_back_memory


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table and an object of the JSON file."""

    name: str
    unit: str
    ours: float | None = None
    peer: float | None = None
    ratio: float | None = None
    """Ours over the peer's, in every unit."""
    spread: tuple[float, float] | None = None
    """Quartiles of the ratio over the rounds; without a peer, of ours."""
    floor: float | None = None
    """Always None: the key is part of the file's format."""
    note: str = ""
    details: dict[str, Any] | None = None


def measure(row: Comparison, bench: BenchConfig) -> Row:
    """`row` measured; a row with a note and no figures where a side does not fit in memory."""
    give_back_memory()
    sides = [side for side in (row.ours, row.peer) if side is not None]
    needed, free = [bytes_needed(side) for side in sides], available_bytes()
    if free is not None and max(needed) > 0.85 * free:
        note = f"needs about {max(needed) / 1e9:.0f} GB of {free / 1e9:.0f} GB free"
        return Row(name=row.name, unit=row.unit, note=f"left out: {note}")
    if row.unit == "MB":
        return _memory(row, sides)
    builders = [partial(build, side) for side in sides]
    if len(sides) == 1 or free is None or sum(needed) < 0.7 * free:
        note, seconds = "", take_turns([build() for build in builders], bench.rounds)
    else:
        note, seconds = "built in turns, for want of memory", alternate(builders, bench.rounds)
    names = ("ours", "peer")[: len(sides)]
    details: dict[str, Any] = dict(zip(names, map(asdict, sides), strict=True))
    details["seconds"] = dict(zip(names, seconds, strict=True))
    values = [_values(row.unit, *each) for each in zip(sides, seconds, strict=True)]
    return _row(row, values, note, details)


def _values(unit: str, side: Workload, seconds: Sequence[float]) -> list[float]:
    return [side.tokens / each if unit == "tokens/s" else 1000 * each for each in seconds]


def _row(row: Comparison, values: list[list[float]], note: str, details: dict[str, Any]) -> Row:
    """The medians of each side's `values`, one a round, and of their ratios."""
    ours, *peer = values
    ratios = [a / b for a, b in zip(ours, *peer, strict=True)] if peer else []
    return Row(
        name=row.name,
        unit=row.unit,
        ours=statistics.median(ours),
        peer=statistics.median(peer[0]) if peer else None,
        ratio=statistics.median(ratios) if peer else None,
        spread=spread(ratios or ours) if len(ours) > 1 else None,
        note=note,
        details=details,
    )


def _memory(row: Comparison, sides: Sequence[Workload]) -> Row:
    try:
        values = [[peak_memory(side, torch.get_num_threads())] for side in sides]
    except RuntimeError as error:  # costs this row, not the whole run
        note = f"left out: {str(error).splitlines()[0]}"
        return Row(name=row.name, unit=row.unit, note=note)
    return _row(row, values, "", {"side": asdict(row.ours)})


def alternate(builders: Sequence[Callable[[], Work]], rounds: int) -> list[list[float]]:
    """As `take_turns`, for sides that do not fit in memory together. Each turn builds a side, calls
    it once to warm up and twice timed, and frees it."""
    times: list[list[float]] = [[] for _ in builders]
    for _ in range(-(-rounds // 2)):
        for builder, taken in zip(builders, times, strict=True):
            work = builder()
            work()
            taken += [seconds(work), seconds(work)]
            del work
            give_back_memory()
    return times


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The quartiles of `values`; of fewer than four, the least and the largest."""
    shares = [0.0, 1.0] if len(values) < 4 else [0.25, 0.75]
    low, high = np.quantile(values, shares).tolist()
    return low, high


def share_of_limit(row: Comparison, measured: Row, limit: float) -> Row | None:
    """The share of `limit` (FLOP/s) that a plain training step reaches; None for other rows."""
    side, shape = row.ours, row.ours.shape
    plain = side.kind == "train" and row.unit == "tokens/s" and side.optimizer == "adamw"
    if not plain or side.dropout or measured.ours is None or "compiled" in row.name:
        return None
    lengths = shape.input_length, shape.target_length
    each = 100 * training_flops_per_token(shape.model(side.experts), *lengths) / limit
    quartiles, peer = measured.spread, measured.peer
    if quartiles is not None and peer is None:  # without a peer the spread is of rates
        quartiles = each * quartiles[0], each * quartiles[1]
    return Row(
        name=f"share of the limit, train {side.label}",
        unit="%",
        ours=each * measured.ours,
        peer=None if peer is None else each * peer,
        ratio=measured.ratio,
        spread=quartiles,
    )


def matrix_limit(size: int, precision: Precision, rounds: int = 5) -> float:
    """Floating-point operations per second of a square product, the best of `rounds`. x W^T as in a
    linear layer: where bfloat16 is emulated x W is ten times slower."""
    dtype = getattr(torch, precision)
    a, b = (torch.randn(size, size).to(compute_device(), dtype) for _ in range(2))
    F.linear(a, b)
    return 2 * size**3 / min(seconds(lambda: F.linear(a, b)) for _ in range(rounds))
