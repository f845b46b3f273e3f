"""Meshes a model can be trained on, and a step on one of them: `explain --search`, `--simulate`."""

import math
from collections.abc import Iterator
from dataclasses import replace

from switchworks.config import ConfigError
from switchworks.parallel import check_fit
from switchworks.plan.explain import memory_per_rank
from switchworks.plan.machines import Machine
from switchworks.plan.simulate import simulate, simulate_with_depth
from switchworks.plan.summary import GIB, MAX_RANKS, Plan, mesh_flags
from switchworks.training import Experiment


def make_plan(
    experiment: Experiment, machine: Machine, memory: float | None = None, ranks: int | None = None
) -> Plan:
    """Simulate a step on `machine`; with `memory` (GiB), propose another mesh if it does not fit.

    `ranks`, in place of a mesh, selects the fastest mesh of so many that fits, else the last of
    those that are possible. Raises ConfigError for a mesh that cannot work, naming one of the same
    size that can.
    """
    experiment = experiment.resolved("bfloat16")  # which is what "auto" means on all of them
    limit = machine.memory_gib if memory is None else memory
    if ranks is not None and ranks != experiment.mesh.size:
        if experiment.mesh.size != 1:
            raise ConfigError(
                f"--ranks {ranks}, but the mesh has {experiment.mesh.size} places.\n"
                "  Leave --ranks out, or the mesh, which is then chosen."
            )
        fitting = [plan.experiment for plan in find_meshes(experiment, ranks, limit, machine)]
        experiment = fitting[0] if fitting else possible_meshes(experiment, ranks)[-1]
    _check_mesh(experiment)
    plan = Plan(experiment, simulate(experiment), machine, limit)
    if plan.fits or memory is None:
        return plan
    return replace(plan, proposal=propose(experiment, experiment.mesh.size, limit, machine))


def find_meshes(
    experiment: Experiment, devices: int, memory: float, machine: Machine
) -> list[Plan]:
    """All meshes of `devices` ranks on which a step fits in `memory` GiB, fastest first. Each has
    the fewest micro-batches that fit. Footprints are those of `simulate_with_depth`. Raises
    ConfigError, with the reason, if no mesh is possible at all."""
    plans = [
        _fewest_micro_batches(possible, memory, machine)
        for possible in possible_meshes(experiment.resolved("bfloat16"), devices)
        if memory_per_rank(possible)["total"] <= memory * GIB  # else it is not worth tracing
    ]
    return sorted(filter(None, plans), key=lambda plan: plan.estimate.step)


def propose(experiment: Experiment, devices: int, memory: float, machine: Machine) -> Plan | None:
    """The fastest mesh of `devices` ranks that fits in `memory` GiB, else of twice as many, up to
    `MAX_RANKS`."""
    while devices <= MAX_RANKS:
        try:
            if plans := find_meshes(experiment, devices, memory, machine):
                return plans[0]
        except ConfigError:
            pass  # no mesh of so many is possible
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


def _check_mesh(experiment: Experiment) -> None:
    try:
        check_fit(experiment.model, experiment.mesh)
    except ConfigError as error:
        try:
            mesh = possible_meshes(experiment, experiment.mesh.size)[0].mesh
        except ConfigError:
            raise error from None
        message = f"{error}\n  One of {mesh.size} that works: {mesh_flags(mesh)}."
        raise ConfigError(message) from None


def _fewest_micro_batches(experiment: Experiment, memory: float, machine: Machine) -> Plan | None:
    """`experiment` with the fewest micro-batches whose step fits; None if it never does."""
    routing, least = experiment.model.routing, 1
    rows = experiment.batch_size // experiment.mesh.batch
    groups = rows if routing is None else rows // routing.group_sequences
    for micro_batches in _divisors(groups):
        if micro_batches < least:
            continue
        divided = replace(experiment, micro_batches=micro_batches)
        plan = Plan(divided, simulate_with_depth(divided), machine, memory)
        if plan.fits:
            return plan
        footprint = plan.footprint
        room = memory * GIB - (footprint.peak - footprint.activations)
        if room <= 0:
            break
        # Activations are roughly proportional to the rows computed at once, so numbers that are
        # sure to be too small are skipped; 0.9 allows for what does not shrink with the rows.
        enough = 0.9 * micro_batches * footprint.activations / room
        least = max(micro_batches + 1, math.floor(enough))
    return None


def _factorisations(devices: int) -> Iterator[tuple[int, int, int]]:
    for model in _divisors(devices):
        for expert in _divisors(devices // model):
            yield devices // model // expert, expert, model


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
