"""Step time against the number of experts at fixed tokens, beside what memory traffic allows.

Letters: E experts.
"""

import statistics
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from switchworks.bench.config import BenchConfig, Precision, Shape, Workload
from switchworks.bench.measure import Row, alternate, spread
from switchworks.bench.memory import available_bytes
from switchworks.bench.workloads import build, bytes_needed
from switchworks.device import seconds
from switchworks.disk import whole_file
from switchworks.model import num_parameters

EXPERTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SWEEP = Shape(d_model=256, d_ff=512, num_heads=4, layers=2, vocab_size=4096, many_d_ff=None)
"""256 experts of this size and their AdamW state fit in 4 GB."""


def sweep(bench: BenchConfig, precision: Precision) -> list[Row]:
    """One row per E: "ours" is the measured time, "peer" the time that memory traffic predicts.

    That is the time at E = 1 plus the bytes that more experts add over the bandwidth of a copy in
    this run. Every E that fits in memory takes its turn, so that a slow spell of the machine
    affects all.
    """
    shape, free = SWEEP, available_bytes()
    if bench.shape != Shape():
        shape = replace(bench.shape, many_d_ff=None)
    sides = [Workload(shape=shape, precision=precision, experts=experts) for experts in EXPERTS]
    sides = [side for side in sides if free is None or bytes_needed(side) < 0.7 * free]
    times = alternate([partial(build, side) for side in sides], bench.rounds)
    bandwidth = copy_bandwidth()
    first, least = statistics.median(times[0]), traffic(sides[0])
    return [
        _row(side, taken, first + (traffic(side) - least) / bandwidth, bandwidth)
        for side, taken in zip(sides, times, strict=True)
    ]


def traffic(side: Workload) -> float:
    """Bytes of weights, gradients and AdamW state that a training step moves.

    In bytes per weight, in float32: weights read forward and backward 8, gradient written and read
    for its norm 8, optimizer reading weight, gradient and two moments 16 and writing three of them
    12. In bfloat16 the first two are 4 each, the gradient is also cast to float32, 2 + 4, and the
    new weight to bfloat16, 4 + 2.
    """
    each = 44 if side.precision == "float32" else 4 + 4 + 6 + 28 + 6
    return float(each * num_parameters(side.shape.model(side.experts)))


def copy_bandwidth(megabytes: int = 256) -> float:
    """Bytes read and written per second by a copy far larger than any cache."""
    source = torch.ones(megabytes * 2**18)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(5))


def _row(side: Workload, taken: list[float], line: float, bandwidth: float) -> Row:
    middle = statistics.median(taken)
    return Row(
        name=f"step time {side.label}",
        unit="ms",
        ours=1000 * middle,
        peer=1000 * line,
        ratio=middle / line,
        spread=spread([each / line for each in taken]),
        note=f"line at {bandwidth / 1e9:.1f} GB/s",
        details={"side": asdict(side), "seconds": taken, "traffic_bytes": traffic(side)},
    )


def draw_sweep(rows: list[Row], file: Path) -> None:
    """Write `file`: measured step time against E, with its quartiles, and the line of traffic."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.subplots()
    experts = [(row.details or {})["side"]["experts"] for row in rows]
    lines = np.array([row.peer for row in rows])
    low, high = lines * np.array([row.spread or (1.0, 1.0) for row in rows]).T
    ax.plot(experts, lines, "--", color="#8a8f96", label="memory traffic")
    ax.vlines(experts, low, high, color="#0072b2", alpha=0.5)
    ax.plot(experts, [row.ours or 0.0 for row in rows], "o-", color="#0072b2", label="measured")
    ax.set_xscale("log", base=2)
    ax.set_xticks(experts, [str(number) for number in experts])
    ax.set_ylim(bottom=0)
    ax.set_xlabel("experts, at the same number of tokens")
    ax.set_ylabel("ms per training step")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    with whole_file(file) as aside:
        figure.savefig(aside, dpi=150)
