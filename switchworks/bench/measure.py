"""From comparisons to rows: builds both sides, times them in turns, and takes medians."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from switchworks.bench.config import BenchConfig, Comparison, Precision, Workload, label
from switchworks.bench.decode import build_decoding
from switchworks.bench.layer import build_layer
from switchworks.bench.memory import available_bytes, peaks
from switchworks.bench.peers import build_peer
from switchworks.bench.timing import Times, Work, alternate, seconds, spread, take_turns
from switchworks.bench.train import build_step
from switchworks.bench.weights import bytes_needed, new_model, random_batch
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
    """Ours over the peer's, in every unit."""
    spread: tuple[float, float] | None = None
    """Quartiles of the ratio over the rounds; without a peer, of ours."""
    floor: float | None = None
    """Always None: the key is part of the file's format."""
    note: str = ""
    details: dict[str, Any] | None = None

    @property
    def less_is_better(self) -> bool:
        """Whether ours should be below the peer's."""
        return self.unit in ("ms", "s", "MB")


def build(workload: Workload) -> Work:
    """`workload` ready to be called: a training step, a decoding or a layer's pass."""
    if workload.system != "ours":
        return build_peer(workload, new_model(workload), random_batch(workload.shape))
    builders = {"train": build_step, "decode": build_decoding, "layer": build_layer}
    return builders[workload.kind](workload)


def measure(row: Comparison, bench: BenchConfig) -> Row:
    """`row` measured; a row with a note and no figures where a side does not fit in memory."""
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
    if quartiles is not None and peer is None:  # without a peer the spread is of rates
        quartiles = share(quartiles[0]), share(quartiles[1])
    return Row(
        name=f"share of the limit, train {label(side.experts)}",
        unit="%",
        ours=share(measured.ours),
        peer=None if peer is None else share(peer),
        ratio=measured.ratio,
        spread=quartiles,
    )


def matrix_limit(size: int, precision: Precision, rounds: int = 5) -> float:
    """Floating-point operations per second of a square product, the best of `rounds`.

    x W^T as in a linear layer: where bfloat16 is emulated x W is ten times slower.
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
        note=note,
        details={"seconds": times._asdict(), "ours": asdict(row.ours), "peer": asdict(peer)},
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
    except RuntimeError as error:  # costs this row, not the whole run
        note = f"left out: {str(error).splitlines()[0]}"
        return Row(name=row.name, unit=row.unit, ours=None, note=note)
    phases = {"ours": ours._asdict(), "peer": None if peer is None else peer._asdict()}
    return Row(
        name=row.name,
        unit="MB",
        ours=max(ours),
        peer=None if peer is None else max(peer),
        ratio=None if peer is None else max(ours) / max(peer),
        details={"phases": phases, "side": asdict(row.ours)},
    )
