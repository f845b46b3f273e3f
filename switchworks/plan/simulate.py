"""One training step of one rank, traced without data or devices: `explain --simulate`.

The model is built on the meta device and spread over fake ranks by the code that training uses, and
the step is training's own, so what is counted is what a run does.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from switchworks.fast import attention, norm
from switchworks.optim import adafactor
from switchworks.parallel import Ranks, check_fit
from switchworks.plan.fake import fake_ranks, fake_tensors
from switchworks.plan.footprint import Footprint, dummy_batch, measure_step
from switchworks.plan.trace import Operation, Traffic
from switchworks.training import Experiment, spread_model, state_of


def simulate(experiment: Experiment) -> Footprint:
    """What a step of `experiment` takes of one rank of its mesh.

    Two and three micro-batches are traced and larger numbers extrapolated, as all are alike.
    Without a capacity the load is taken to be even. Raises ConfigError if the model does not fit
    the mesh.
    """
    check_fit(experiment.model, experiment.mesh)
    with fake_ranks(experiment.mesh) as ranks:
        return simulate_on(ranks, experiment)


def simulate_with_depth(experiment: Experiment) -> Footprint:
    """`simulate` at a cost that does not grow with the depth of the model.

    Two and three of the model's periods (`routing.every` blocks of each stack) are traced and the
    others extrapolated. Counts are exact where blocks are alike, the peak is within some per cent.
    """
    model = experiment.model
    period = 1 if model.routing is None else model.routing.every
    periods = model.num_layers / period
    with fake_ranks(experiment.mesh) as ranks:
        if periods <= 3 or model.num_decoder_layers not in (None, model.num_layers):
            return simulate_on(ranks, experiment)
        two, three = (
            replace(model, num_layers=count * period, num_decoder_layers=None) for count in (2, 3)
        )
        first = simulate_on(ranks, replace(experiment, model=two))
        second = simulate_on(ranks, replace(experiment, model=three))
    return extrapolate(first, second, periods - 2)


def simulate_on(ranks: Ranks, experiment: Experiment) -> Footprint:
    """`simulate` on fake `ranks` that exist already."""
    experiment = _with_even_load(experiment)
    parts = experiment.micro_batches
    if parts <= 3:
        return trace_step(ranks, experiment)
    two, three = (trace_step(ranks, _with_micro_batches(experiment, count)) for count in (2, 3))
    return extrapolate(two, three, parts - 2)


def trace_step(ranks: Ranks, experiment: Experiment) -> Footprint:
    """Build a model without values on fake `ranks` and trace one step, every micro-batch of it."""
    # The kernels for CPUs read token counts on the host, which fake tensors do not have: on the
    # meta device those that suit any accelerator are put in. Splitting is free of cost there too.
    on_meta = copy.copy(ranks)
    on_meta.device = torch.device("meta")
    spread = spread_model(experiment, None, on_meta, empty=True)
    with fake_tensors(), _large_blocks():
        state = state_of(experiment, spread, ranks, empty=True)
        return measure_step(state, dummy_batch(experiment))


@contextmanager
def _large_blocks() -> Iterator[None]:
    """Inside, optimizer and norms compute on a tensor in one piece, and attention on 2^24 scores
    at a time: an accelerator has no cache to fit, and every block takes time to trace."""
    original = adafactor._BLOCK, norm._BLOCK, attention.BLOCK
    adafactor._BLOCK, norm._BLOCK, attention.BLOCK = 2**62, 2**62, 2**24
    try:
        yield
    finally:
        adafactor._BLOCK, norm._BLOCK, attention.BLOCK = original


def _with_micro_batches(experiment: Experiment, count: int) -> Experiment:
    rows = experiment.batch_size // experiment.micro_batches * count
    return replace(experiment, micro_batches=count, batch_size=rows)


def _with_even_load(experiment: Experiment) -> Experiment:
    """Without a capacity shapes depend on the tokens: every expert gets its share of them."""
    routing = experiment.model.routing
    if routing is None or routing.capacity_factor is not None or routing.expert_capacity:
        return experiment
    even = replace(routing, capacity_factor=1.0, min_capacity=1)
    return replace(experiment, model=replace(experiment.model, routing=even))


def extrapolate(first: Footprint, second: Footprint, steps: float) -> Footprint:
    """The footprint `steps` beyond `first` in the direction of `second`, which is one step away:
    every count is taken to be linear."""

    def at(a: float, b: float) -> int:
        return round(a + steps * (b - a))

    operations = Counter[Operation]()
    for operation in first.operations.keys() | second.operations.keys():
        operations[operation] = at(first.operations[operation], second.operations[operation])
    counts, next_counts = _traffic_counts(first), _traffic_counts(second)
    traffic = tuple(
        Traffic(*key, *map(at, counts.get(key, (0, 0)), next_counts.get(key, (0, 0))))
        for key in sorted(counts.keys() | next_counts.keys())
    )
    sizes = ("weights", "masters", "gradients", "optimizer")
    return Footprint(
        **{name: at(getattr(first, name), getattr(second, name)) for name in sizes},
        other_peaks=tuple(map(at, first.other_peaks, second.other_peaks)),
        transient_peaks=tuple(map(at, first.transient_peaks, second.transient_peaks)),
        operations=operations,
        traffic=traffic,
    )


def _traffic_counts(footprint: Footprint) -> dict[tuple, tuple[int, int]]:
    """(collective, axis, ranks, span) -> (calls, bytes)."""
    return {item[:4]: (item.calls, item.bytes) for item in footprint.traffic}
