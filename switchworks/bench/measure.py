"""Comparisons become rows."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from switchworks.bench.comparisons import SHARE, Comparison, has_floors, label
from switchworks.bench.config import BenchConfig, Precision, Workload
from switchworks.bench.memory import available_bytes, peaks
from switchworks.bench.sides import build, bytes_needed
from switchworks.bench.timing import Times, alternate, seconds, spread, take_turns
from switchworks.device import compute_device
from switchworks.model import training_flops_per_token
from switchworks.training import give_back_memory


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table and an object of the JSON file."""

    name: str
    unit: str
    ours: float | None
    peer: float | None = None
    ratio: float | None = None
    """tokens/s, %: ours over the peer's. ms, s, MB: too, and less is better."""
    spread: tuple[float, float] | None = None
    """Quartiles of the ratio over the rounds; without a peer, of ours."""
    floor: float | None = None
    note: str = ""
    details: dict[str, Any] | None = None

    @property
    def less_is_better(self) -> bool:
        """Whether the floor is an upper bound."""
        return self.unit in ("ms", "s", "MB")

    @property
    def meets_floor(self) -> bool | None:
        """Whether the row is as good as its floor; None if it has none. Shares are compared
        themselves, anything else by its ratio."""
        value = self.ours if self.unit == "%" else self.ratio
        if self.floor is None or value is None:
            return None
        return value <= self.floor if self.less_is_better else value >= self.floor


def measure(row: Comparison, bench: BenchConfig) -> Row:
    """`row` measured; where a side does not fit in memory, a row without figures that says so."""
    give_back_memory()
    largest = max(bytes_needed(side) for side in (row.ours, row.peer) if side is not None)
    free = available_bytes()
    if free is not None and largest > 0.85 * free:
        note = f"left out: needs about {largest / 1e9:.0f} GB of {free / 1e9:.0f} GB free"
        return Row(name=row.name, unit=row.unit, ours=None, note=note)
    if row.unit == "MB":
        return _memory(row)
    return _alone(row, bench.rounds) if row.peer is None else _paired(row, row.peer, bench.rounds)


def share_of_limit(row: Comparison, measured: Row, limit: float) -> Row | None:
    """The share of `limit` (FLOP/s) that a plain training step reaches; None for other rows."""
    side = row.ours
    plain = side.kind == "train" and row.unit == "tokens/s" and side.optimizer == "adamw"
    if not plain or side.dropout or measured.ours is None or "compiled" in row.name:
        return None
    shape = side.shape
    flops = training_flops_per_token(
        shape.model(side.experts), shape.input_length, shape.target_length
    )

    def share(rate: float) -> float:
        return 100 * rate * flops / limit

    quartiles, peer = measured.spread, measured.peer
    if quartiles is not None and peer is None:  # then they are rates
        quartiles = share(quartiles[0]), share(quartiles[1])
    return Row(
        name=f"share of the limit, train {label(side.experts)}",
        unit="%",
        ours=share(measured.ours),
        peer=None if peer is None else share(peer),
        ratio=measured.ratio,
        spread=quartiles,
        floor=SHARE.get(side.experts) if has_floors(shape, side.precision) else None,
    )


def matrix_limit(size: int, precision: Precision, rounds: int = 5) -> float:
    """The most floating-point operations per second of a square product, in `rounds` tries.

    As a linear layer has it: emulated bfloat16 is ten times slower the other way round.
    """
    dtype = getattr(torch, precision)
    a, b = (torch.randn(size, size).to(compute_device(), dtype) for _ in range(2))
    F.linear(a, b)
    return 2 * size**3 / min(seconds(lambda: F.linear(a, b)) for _ in range(rounds))


def _paired(row: Comparison, peer: Workload, rounds: int) -> Row:
    both, free = bytes_needed(row.ours) + bytes_needed(peer), available_bytes()
    together = free is None or both < 0.7 * free
    if together:
        times = take_turns(build(row.ours), build(peer), rounds)
    else:
        times = alternate(lambda: build(row.ours), lambda: build(peer), rounds)
    return _row(row, peer, times, "" if together else "built in turns, for want of memory")


def _row(row: Comparison, peer: Workload, times: Times, note: str) -> Row:
    ours, theirs = times.medians
    ratios = times.ratios()
    if row.unit == "tokens/s":
        rates, ratios = (row.ours.tokens / ours, peer.tokens / theirs), [1 / r for r in ratios]
    else:
        rates = (1000 * ours, 1000 * theirs)
    return Row(
        name=row.name,
        unit=row.unit,
        ours=rates[0],
        peer=rates[1],
        ratio=statistics.median(ratios),
        spread=spread(ratios),
        floor=row.floor,
        note=note,
        details={"seconds": asdict_times(times), "ours": asdict(row.ours), "peer": asdict(peer)},
    )


def _alone(row: Comparison, rounds: int) -> Row:
    work = build(row.ours)
    work()
    taken = [seconds(work) for _ in range(rounds)]
    per_token = row.unit == "tokens/s"
    values = [row.ours.tokens / each if per_token else 1000 * each for each in taken]
    return Row(
        name=row.name,
        unit=row.unit,
        ours=statistics.median(values),
        spread=spread(values),
        details={"seconds": {"ours": taken}, "ours": asdict(row.ours)},
    )


def _memory(row: Comparison) -> Row:
    threads = torch.get_num_threads()
    try:
        ours = peaks(row.ours, threads)
        peer = None if row.peer is None else peaks(row.peer, threads)
    except RuntimeError as error:  # one row less, and not a run of an hour
        note = f"left out: {str(error).splitlines()[0]}"
        return Row(name=row.name, unit=row.unit, ours=None, note=note)
    phases = {"ours": ours._asdict(), "peer": None if peer is None else peer._asdict()}
    return Row(
        name=row.name,
        unit="MB",
        ours=max(ours),
        peer=None if peer is None else max(peer),
        ratio=None if peer is None else max(ours) / max(peer),
        floor=row.floor,
        details={"phases": phases, "side": asdict(row.ours)},
    )


def asdict_times(times: Times) -> dict[str, list[float]]:
    """Seconds of every round, by side."""
    return dict(times._asdict())
