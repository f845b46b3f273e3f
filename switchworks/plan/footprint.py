"""What a training step takes of one rank, counted while it runs: for real, or with no numbers."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from switchworks.batch import Batch
from switchworks.optim import BackwardUpdater, UpdateStats, local
from switchworks.plan.trace import Trace, Traffic, Work, tensors_in
from switchworks.training import Experiment, TrainState, train_step

PHASES = ("forward and backward", "gathering gradients", "updating")
"""In each of them the peak grows evenly with the depth of a model; which is the highest changes."""


@dataclass(frozen=True)
class Footprint:
    """Bytes, operations and traffic of one rank in one step."""

    weights: int
    """Bytes of the weights it computes with."""
    masters: int
    """Bytes of float32 weights beside those of 16 bits."""
    gradients: int
    """Bytes of the gradients that the optimizer reads: of all, unless weights move in the backward
    pass, when it is the most that are there at once."""
    optimizer: int
    """Bytes of the optimizer's state."""
    others: tuple[int, ...]
    """The most bytes of anything else that are alive at once, in each of the `PHASES`."""
    passing: tuple[int, ...]
    """The same with gradients."""
    work: Counter[Work] = field(repr=False)
    traffic: tuple[Traffic, ...]

    @property
    def activations(self) -> int:
        """The most bytes of anything else that are alive at once."""
        return max(self.others)

    @property
    def peak(self) -> int:
        """The most bytes that are alive at once, of everything."""
        return self.held + max(self.passing)

    @property
    def flops(self) -> int:
        """Floating-point operations of matrix products, forward, backward and again."""
        return sum(work.flops * times for work, times in self.work.items())

    @property
    def moved(self) -> int:
        """Bytes that operations read and write, each by itself as torch runs them eagerly."""
        return sum(work.moved * times for work, times in self.work.items())

    @property
    def held(self) -> int:
        """Bytes that stay between steps."""
        return self.weights + self.masters + self.optimizer


def measure_step(state: TrainState, batch: Batch) -> Footprint:
    """Take one step with `batch`, and what it took."""
    trace, updater = Trace(state.ranks.mesh), state.updater
    held = _held(state)
    trace.hold(_lasting(state))
    trace.hold(tensors_in(vars(batch)))
    gradients: list[int] = []
    accumulate, update = updater.accumulate, updater.step

    def grads_of_parameters() -> Iterator[Tensor]:
        return (p.grad for p in state.model.parameters() if p.grad is not None)

    def marked() -> None:
        trace.mark(grads_of_parameters())
        before, trace.phase = trace.phase, max(1, trace.phase)
        accumulate()
        trace.phase = before
        trace.mark(updater.gradients().values())

    def counted(step: int, total_steps: int) -> UpdateStats:
        trace.mark(grads_of_parameters())  # if there was nothing to accumulate
        gradients.append(_bytes_of(updater.gradients().values()))
        trace.phase = 2
        return update(step, total_steps)

    updater.accumulate, updater.step = marked, counted
    if isinstance(updater, BackwardUpdater):
        move = updater.update

        def counted_early(names: list[str]) -> None:
            trace.mark(grads_of_parameters())
            gradients.append(_bytes_of(updater.gradients().values()))
            move(names)

        updater.update = counted_early
    try:
        with trace:
            train_step(state, batch)
    finally:
        for name in ("accumulate", "step", "update"):
            vars(updater).pop(name, None)
    passing, others = trace.peaks(len(PHASES))
    return Footprint(
        **held,
        gradients=max(gradients),
        others=others,
        passing=passing,
        work=trace.work,
        traffic=tuple(trace.traffic),
    )


def _lasting(state: TrainState) -> Iterator[Tensor]:
    """All that stays between steps."""
    saved = state.state_dict()
    yield from state.model.parameters()
    yield from saved["weights"].values()
    for slots in saved["optimizer"].values():
        yield from slots.values()


def _held(state: TrainState) -> dict[str, int]:
    weights = dict(state.model.named_parameters())
    saved = state.state_dict()
    masters = [saved["weights"][name] for name in weights]
    apart = [m for m, w in zip(masters, weights.values(), strict=True) if m.dtype != w.dtype]
    slots = [slot for slots in saved["optimizer"].values() for slot in slots.values()]
    return {
        "weights": _bytes_of(weights.values()),
        "masters": _bytes_of(apart),
        "optimizer": _bytes_of(slots),
    }


def _bytes_of(tensors: Any) -> int:
    parts = [local(tensor) for tensor in tensors if isinstance(tensor, Tensor)]
    return sum(part.numel() * part.element_size() for part in parts)


def batch_like(experiment: Experiment) -> Batch:
    """A rank's rows of a batch of `experiment`, as the pipeline shapes them, all of ones."""
    data = experiment.data
    rows = experiment.batch_size // experiment.mesh.batch
    inputs = torch.ones(rows, data.input_length, dtype=torch.int64)
    targets = torch.ones(rows, data.target_length, dtype=torch.int64)
    if not data.packing:
        return Batch(inputs=inputs, targets=targets)
    segments = {"input_segments": torch.ones_like(inputs)} if inputs.shape[1] else {}
    return replace(
        Batch(inputs=inputs, targets=targets),
        **segments,
        target_segments=torch.ones_like(targets),
    )
