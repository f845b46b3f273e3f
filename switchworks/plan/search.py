"""Meshes that a model can be trained on, the fastest first by the formula of machines.py."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from switchworks.config import ConfigError
from switchworks.parallel import check_fit
from switchworks.plan.fake import fake_ranks
from switchworks.plan.footprint import Footprint
from switchworks.plan.machines import Estimate, Machine, estimate
from switchworks.plan.simulate import along, simulate_on
from switchworks.plan.weights import least_bytes
from switchworks.training import Experiment

GIB = 2**30
MOST = 4096
"""Ranks of the largest mesh that is looked at."""


@dataclass(frozen=True)
class Candidate:
    """A mesh with the micro-batches it needs."""

    experiment: Experiment
    footprint: Footprint
    estimate: Estimate

    @property
    def flags(self) -> str:
        """How to ask for it."""
        mesh, parts = self.experiment.mesh, self.experiment.micro_batches
        return (
            f"--mesh.data {mesh.data} --mesh.expert {mesh.expert} --mesh.model {mesh.model} "
            f"--micro-batches {parts}"
        )


def search(
    experiment: Experiment, devices: int, memory: float, machine: Machine
) -> list[Candidate]:
    """All meshes of `devices` ranks on which a step fits in `memory` GiB, fastest first.

    Of each the fewest micro-batches that fit. What a step takes is traced at a small depth and
    continued to the model's, see `outline`. Raises ConfigError, with what stands in the way, if
    no mesh can work at all.
    """
    found = []
    for some in workable(experiment, devices):
        if least_bytes(some) <= memory * GIB:
            footprint, fitting = _fewest_parts(some, memory)
            if footprint is not None:
                cost = estimate(machine, footprint.work, footprint.traffic)
                found.append(Candidate(fitting, footprint, cost))
    return sorted(found, key=lambda candidate: candidate.estimate.step)


def propose(
    experiment: Experiment, devices: int, memory: float, machine: Machine
) -> Candidate | None:
    """The fastest mesh of `devices` that fits in `memory` GiB; else of twice as many, and so on."""
    while devices <= MOST:
        try:
            found = search(experiment, devices, memory, machine)
        except ConfigError:
            found = []
        if found:
            return found[0]
        devices *= 2
    return None


def workable(experiment: Experiment, devices: int) -> list[Experiment]:
    """`experiment` on every mesh of `devices` that its shape and its batch allow, each with as few
    micro-batches as there can be. Raises ConfigError with the last reason if there is none."""
    found, reason = [], ""
    for data, expert, width in _factorisations(devices):
        mesh = replace(experiment.mesh, data=data, expert=expert, model=width)
        try:
            check_fit(experiment.model, mesh)
            found.append(replace(experiment, mesh=mesh, micro_batches=1))
        except ConfigError as error:
            reason = str(error)
    if not found:
        raise ConfigError(f"No mesh of {devices} ranks can work. The last one:\n{reason}")
    return found


def outline(experiment: Experiment) -> Footprint:
    """What a step takes, traced at two and three of the model's periods (`routing.every` blocks of
    each stack) and continued to all of them. Counts are exact where blocks are alike; the peak is
    within some per cent."""
    model = experiment.model
    period = 1 if model.routing is None else model.routing.every
    periods = model.num_layers / period
    with fake_ranks(experiment.mesh) as ranks:
        listed = model.routing is not None and (
            model.routing.encoder_blocks is not None or model.routing.decoder_blocks is not None
        )
        if listed or periods <= 3 or model.num_decoder_layers not in (None, model.num_layers):
            return simulate_on(ranks, experiment)
        two, three = (
            simulate_on(
                ranks,
                replace(
                    experiment,
                    model=replace(model, num_layers=count * period, num_decoder_layers=None),
                ),
            )
            for count in (2, 3)
        )
    return along(two, three, periods - 2)


def _fewest_parts(experiment: Experiment, memory: float) -> tuple[Footprint | None, Experiment]:
    """The fewest micro-batches with which a step fits, and what it takes; None if it never does."""
    least = 1
    for parts in _divisors(_groups_of_a_rank(experiment)):
        if parts < least:
            continue
        some = replace(experiment, micro_batches=parts)
        footprint = outline(some)
        if footprint.peak <= memory * GIB:
            return footprint, some
        room = memory * GIB - (footprint.peak - footprint.activations)
        if room <= 0:
            break
        # Activations are about in proportion to the rows computed at once.
        least = max(parts + 1, math.floor(0.9 * parts * footprint.activations / room))
    return None, experiment


def _groups_of_a_rank(experiment: Experiment) -> int:
    """Into how many parts a rank's rows can be cut."""
    routing = experiment.model.routing
    rows = experiment.batch_size // experiment.mesh.batch
    return rows if routing is None else rows // routing.group_sequences


def _factorisations(devices: int) -> Iterator[tuple[int, int, int]]:
    """All (data, expert, model) of so many ranks."""
    for model in _divisors(devices):
        for expert in _divisors(devices // model):
            yield devices // model // expert, expert, model


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
