"""What one training step takes of one rank, counted while the step runs, real or simulated."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from switchworks.batch import Batch
from switchworks.optim import MasterWeights, local
from switchworks.plan.trace import Operation, Trace, Traffic, tensors_in
from switchworks.training import Experiment, TrainState, train_step

PHASES = ("forward and backward", "accumulating gradients", "updating weights")
"""Within each the peak is linear in the depth of a model. Which of them is highest is not."""
_BACKWARD, _ACCUMULATE, _UPDATE = range(3)


@dataclass(frozen=True)
class Footprint:
    """Bytes, operations and traffic of one rank in one step."""

    weights: int
    masters: int
    gradients: int
    """Bytes of the gradients that the optimizer reads: all of them or, if weights are updated in
    the backward pass, the most that exist at once."""
    optimizer: int
    other_peaks: tuple[int, ...]
    """The most bytes of anything else that exist at once, in each of the `PHASES`."""
    transient_peaks: tuple[int, ...]
    """The same with gradients."""
    operations: Counter[Operation] = field(repr=False)
    traffic: tuple[Traffic, ...]

    @property
    def activations(self) -> int:
        """The most bytes of activations and temporaries that exist at once."""
        return max(self.other_peaks)

    @property
    def peak(self) -> int:
        """The most bytes of everything that exist at once."""
        return self.persistent + max(self.transient_peaks)

    @property
    def persistent(self) -> int:
        """Bytes that stay from step to step."""
        return self.weights + self.masters + self.optimizer

    @property
    def flops(self) -> int:
        """Floating-point operations of matrix products, recomputation included."""
        return sum(operation.flops * count for operation, count in self.operations.items())

    @property
    def moved(self) -> int:
        """Bytes that operations read and write, one by one as torch runs them eagerly."""
        return sum(operation.bytes * count for operation, count in self.operations.items())

    @property
    def sent(self) -> float:
        """Bytes that this rank sends."""
        return sum(item.sent for item in self.traffic)


class _TracedMasters(MasterWeights):
    """Tells a trace which tensors are gradients and when weights are updated; takes the place of
    `masters`, through which alone updaters read gradients, for one step."""

    def __init__(self, masters: MasterWeights, trace: Trace) -> None:
        vars(self).update(vars(masters))
        self.trace = trace
        self.gradient_bytes = 0

    def gradients(self) -> dict[str, Tensor]:
        gradients = super().gradients()
        self.trace.mark_gradients(gradients.values())
        self.gradient_bytes = max(self.gradient_bytes, _bytes(gradients.values()))
        return gradients

    def accumulate(self) -> None:
        parameters = self.parameters.values()
        self.trace.mark_gradients(p.grad for p in parameters if p.grad is not None)
        self.trace.phase = _ACCUMULATE
        super().accumulate()
        self.trace.phase = _BACKWARD
        self.gradients()

    def prepare_grads(self, names: Iterable[str], scale: float) -> None:
        self.trace.phase = _UPDATE
        super().prepare_grads(names, scale)

    def zero(self, names: Iterable[str] | None = None) -> None:
        super().zero(names)
        self.trace.phase = _BACKWARD  # the last act of an update, which may be in a backward pass


def measure_step(state: TrainState, batch: Batch) -> Footprint:
    """Take one step with `batch` and count what it takes."""
    trace, updater = Trace(state.ranks.mesh), state.updater
    saved = state.state_dict()
    parameters = dict(state.model.named_parameters())
    slots = [slot for slots in saved["optimizer"].values() for slot in slots.values()]
    trace.exclude([*parameters.values(), *saved["weights"].values(), *slots])
    trace.exclude(tensors_in(vars(batch)))
    masters = updater.masters
    updater.masters = traced = _TracedMasters(masters, trace)
    try:
        with trace.tracking_resizes(), trace:
            train_step(state, batch)
    finally:
        updater.masters = masters
    transient_peaks, other_peaks = trace.peaks(len(PHASES))
    return Footprint(
        weights=_bytes(parameters.values()),
        masters=_bytes(m for n, m in saved["weights"].items() if m.dtype != parameters[n].dtype),
        gradients=traced.gradient_bytes,
        optimizer=_bytes(slots),
        other_peaks=other_peaks,
        transient_peaks=transient_peaks,
        operations=trace.operations,
        traffic=tuple(trace.traffic),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)


def dummy_batch(experiment: Experiment) -> Batch:
    """One rank's rows of a batch of `experiment`: packed rows of full length, all of ones."""
    data = experiment.data
    rows = experiment.batch_size // experiment.mesh.batch
    inputs = torch.ones(rows, data.input_length, dtype=torch.int64)
    targets = torch.ones(rows, data.target_length, dtype=torch.int64)
    return Batch(
        inputs=inputs,
        targets=targets,
        input_segments=torch.ones_like(inputs) if data.input_length else None,
        target_segments=torch.ones_like(targets),
    )
