"""Meshes a model can be trained on, sorted by the estimated time of a step (`machines.py`)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from switchworks.config import ConfigError
from switchworks.parallel import check_fit
from switchworks.plan.footprint import Footprint
from switchworks.plan.machines import Estimate, Machine, estimate
from switchworks.plan.simulate import simulate_with_depth
from switchworks.plan.weights import min_bytes_per_rank
from switchworks.training import Experiment

GIB = 2**30
MAX_RANKS = 4096
"""Ranks of the largest mesh that `propose` tries."""


@dataclass(frozen=True)
class Candidate:
    """A mesh with the micro-batches it needs."""

    experiment: Experiment
    footprint: Footprint
    estimate: Estimate

    @property
    def flags(self) -> str:
        """The flags that select this mesh."""
        mesh, micro_batches = self.experiment.mesh, self.experiment.micro_batches
        return (
            f"--mesh.data {mesh.data} --mesh.expert {mesh.expert} --mesh.model {mesh.model} "
            f"--micro-batches {micro_batches}"
        )


def search(
    experiment: Experiment, devices: int, memory: float, machine: Machine
) -> list[Candidate]:
    """All meshes of `devices` ranks on which a step fits in `memory` GiB, fastest first.

    Each has the fewest micro-batches that fit. Footprints are those of `simulate_with_depth`.
    Raises ConfigError, with the reason, if no mesh is possible at all.
    """
    candidates = []
    for possible in possible_meshes(experiment, devices):
        if min_bytes_per_rank(possible) <= memory * GIB:  # else it is not worth tracing
            candidate = _fewest_micro_batches(possible, memory, machine)
            if candidate is not None:
                candidates.append(candidate)
    return sorted(candidates, key=lambda candidate: candidate.estimate.step)


def propose(
    experiment: Experiment, devices: int, memory: float, machine: Machine
) -> Candidate | None:
    """The fastest mesh of `devices` ranks that fits in `memory` GiB, else of twice as many, up to
    `MAX_RANKS`."""
    while devices <= MAX_RANKS:
        try:
            candidates = search(experiment, devices, memory, machine)
        except ConfigError:
            candidates = []
        if candidates:
            return candidates[0]
        devices *= 2
    return None


def possible_meshes(experiment: Experiment, devices: int) -> list[Experiment]:
    """`experiment` on every mesh of `devices` ranks that its model and its batch allow, without
    micro-batches. Raises ConfigError with the last reason if there is none."""
    possible, reason = [], ""
    for data, expert, width in _factorisations(devices):
        mesh = replace(experiment.mesh, data=data, expert=expert, model=width)
        try:
            check_fit(experiment.model, mesh)
            possible.append(replace(experiment, mesh=mesh, micro_batches=1))
        except ConfigError as error:
            reason = str(error)
    if not possible:
        raise ConfigError(f"No mesh of {devices} ranks can work. The last one:\n{reason}")
    return possible


def _fewest_micro_batches(
    experiment: Experiment, memory: float, machine: Machine
) -> Candidate | None:
    """`experiment` with the fewest micro-batches whose step fits; None if it never does."""
    least = 1
    for micro_batches in _divisors(_groups_per_rank(experiment)):
        if micro_batches < least:
            continue
        divided = replace(experiment, micro_batches=micro_batches)
        footprint = simulate_with_depth(divided)
        if footprint.peak <= memory * GIB:
            cost = estimate(machine, footprint.operations, footprint.traffic)
            return Candidate(divided, footprint, cost)
        room = memory * GIB - (footprint.peak - footprint.activations)
        if room <= 0:
            break
        # Activations are roughly proportional to the rows computed at once, so numbers that are
        # sure to be too small are skipped; 0.9 allows for what does not shrink with the rows.
        enough = 0.9 * micro_batches * footprint.activations / room
        least = max(micro_batches + 1, math.floor(enough))
    return None


def _groups_per_rank(experiment: Experiment) -> int:
    """Routing groups, or rows of a dense model, in a rank's share of the batch."""
    routing = experiment.model.routing
    rows = experiment.batch_size // experiment.mesh.batch
    return rows if routing is None else rows // routing.group_sequences


def _factorisations(devices: int) -> Iterator[tuple[int, int, int]]:
    """All (data, expert, model) whose product is `devices`."""
    for model in _divisors(devices):
        for expert in _divisors(devices // model):
            yield devices // model // expert, expert, model


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
