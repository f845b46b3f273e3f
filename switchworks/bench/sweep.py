"""Step time against the number of experts at fixed tokens, beside what memory traffic allows.

Letters: E experts.
"""

import statistics
from dataclasses import asdict, replace

import torch

from switchworks.bench.config import BenchConfig, Precision, Shape, Workload
from switchworks.bench.measure import Row, build
from switchworks.bench.memory import available_bytes
from switchworks.bench.timing import seconds, spread
from switchworks.bench.weights import bytes_needed
from switchworks.model import num_parameters
from switchworks.training import give_back_memory

EXPERTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SWEEP = Shape(d_model=256, d_ff=512, num_heads=4, layers=2, vocab_size=4096, many_d_ff=None)
"""256 experts of this size and their AdamW state fit in 4 GB."""


def sweep(bench: BenchConfig, precision: Precision) -> list[Row]:
    """One row per E: "ours" is the measured time, "peer" the time that memory traffic predicts.

    That is the time at E = 1 plus the bytes that more experts add over the bandwidth of a copy in
    this run. In each round every E that fits in memory takes a step, so that a slow spell of the
    machine affects all.
    """
    shape = SWEEP if bench.shape == Shape() else replace(bench.shape, many_d_ff=None)
    sides = [Workload(shape=shape, precision=precision, experts=experts) for experts in EXPERTS]
    sides = _fitting(sides)
    taken: dict[int, list[float]] = {side.experts: [] for side in sides}
    for _ in range(bench.rounds):
        for side in sides:
            work = build(side)
            work()
            taken[side.experts].append(seconds(work))
            del work
            give_back_memory()
    bandwidth = copy_bandwidth()
    first, least = statistics.median(taken[sides[0].experts]), traffic(sides[0])
    return [
        _row(side, taken[side.experts], first + (traffic(side) - least) / bandwidth, bandwidth)
        for side in sides
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


def _fitting(sides: list[Workload]) -> list[Workload]:
    free = available_bytes()
    return [side for side in sides if free is None or bytes_needed(side) < 0.7 * free]


def _row(side: Workload, taken: list[float], line: float, bandwidth: float) -> Row:
    middle = statistics.median(taken)
    return Row(
        name=f"step time E={side.experts}",
        unit="ms",
        ours=1000 * middle,
        peer=1000 * line,
        ratio=middle / line,
        spread=spread([each / line for each in taken]),
        note=f"line at {bandwidth / 1e9:.1f} GB/s",
        details={"side": asdict(side), "seconds": taken, "traffic_bytes": traffic(side)},
    )
