"""What `explain --simulate` and `explain --search` print, as numbers and as text."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from switchworks.config import ConfigError
from switchworks.parallel import check_fit
from switchworks.plan.footprint import Footprint
from switchworks.plan.machines import Estimate, Machine, estimate, seconds
from switchworks.plan.search import (
    GIB,
    MAX_RANKS,
    Candidate,
    possible_meshes,
    propose,
    search,
)
from switchworks.plan.simulate import simulate
from switchworks.training import Experiment

_SIZES = {
    "weights": "the model computes with them",
    "masters": "float32 beside bfloat16",
    "gradients": "",
    "optimizer": "",
    "activations": "at their peak, temporaries included",
    "peak": "of everything at once",
}


@dataclass(frozen=True)
class Plan:
    """A simulated step on a machine."""

    experiment: Experiment
    footprint: Footprint
    machine: Machine
    estimate: Estimate
    memory: float
    """GiB of a device."""
    proposal: Candidate | None = None
    """A mesh that fits, if this one does not."""

    @property
    def fits(self) -> bool:
        """Whether the peak is within `memory`."""
        return self.footprint.peak <= self.memory * GIB

    def figures(self) -> dict[str, Any]:
        """Everything as plain numbers, for --json."""
        footprint, cost = self.footprint, self.estimate
        return {
            "mesh": asdict(self.experiment.mesh),
            "micro_batches": self.experiment.micro_batches,
            "parameter_bytes_per_rank": footprint.weights,
            "bytes_per_rank": {name: getattr(footprint, name) for name in _SIZES},
            "peak_bytes_per_rank": footprint.peak,
            "flops_per_rank": footprint.flops,
            "moved_bytes_per_rank": footprint.moved,
            "collectives": [
                item._asdict() | {"sent": item.sent, "seconds": seconds(self.machine, item)}
                for item in footprint.traffic
            ],
            "machine": asdict(self.machine),
            "memory_gib": self.memory,
            "fits": self.fits,
            "estimate": {
                "compute_seconds": cost.compute,
                "communication_seconds": cost.communication,
                "step_seconds": cost.step,
                "overlapped_step_seconds": cost.overlapped,
            },
            "proposal": None if self.proposal is None else self.proposal.flags,
        }

    def text(self) -> str:
        """The same as text."""
        sections = self._memory(), self._traffic(), self._time(), self._fit()
        return "\n".join(line for section in sections for line in section)

    def _memory(self) -> list[str]:
        experiment, mesh = self.experiment, self.experiment.mesh
        return [
            f"one step of one rank, traced on {mesh.size} ranks = data {mesh.data} x expert "
            f"{mesh.expert} x model {mesh.model}, {experiment.micro_batches} micro-batches of "
            f"{experiment.micro_batch_size} rows",
            *(
                f"  {name:<12} {short_bytes(getattr(self.footprint, name)):>11}  {note}".rstrip()
                for name, note in _SIZES.items()
            ),
        ]

    def _traffic(self) -> list[str]:
        lines = [
            f"  {item.collective:<15} {item.axis:<8} {item.ranks:>6} {item.calls:>8} "
            f"{short_bytes(item.bytes):>11} {short_bytes(item.sent):>11} {time:>9.4f}"
            for item, time in zip(self.footprint.traffic, self.estimate.by_traffic, strict=True)
        ]
        head = "  collective      axis      ranks    calls     payload        sent   seconds"
        return [head, *lines] if lines else ["  no communication"]

    def _time(self) -> list[str]:
        m, f, cost = self.machine, self.footprint, self.estimate
        return [
            f"  operations   {f.flops:.3e} FLOPs of matrix products, {short_bytes(f.moved)} read "
            "and written",
            f"  on {m.name}: {m.flops / 1e12:g} TFLOP/s at {m.efficiency:.0%}, memory "
            f"{m.memory_bandwidth / 1e9:g} GB/s, links {m.near / 1e9:g} GB/s in a node of {m.node} "
            f"and {m.far / 1e9:g} out of it, {m.latency * 1e6:g} us a call",
            f"  compute       {cost.compute:10.4f} s  = sum over operations of max(FLOPs / "
            "(efficiency x peak), bytes / memory bandwidth)",
            f"  communication {cost.communication:10.4f} s  = sum over collectives of bytes sent / "
            "link + calls x latency",
            f"  step          {cost.overlapped:10.4f} s if all of that overlaps, {cost.step:.4f} s "
            "if nothing does (a formula, not a measurement)",
        ]

    def _fit(self) -> list[str]:
        peak, memory, proposal = self.footprint.peak / GIB, self.memory, self.proposal
        if self.fits:
            return [f"  fits in {memory:g} GiB: {peak:.2f} at the peak"]
        lines = [f"  does not fit: {peak:.2f} GiB at the peak, and a device has {memory:g}."]
        if proposal is None:
            note = f"  No mesh of up to {MAX_RANKS} ranks fits this batch and these settings."
            return [*lines, note]
        return [
            *lines,
            f"  {proposal.experiment.mesh.size} ranks do: {proposal.flags}",
            f"  ({proposal.footprint.peak / GIB:.2f} GiB, {proposal.estimate.step:.4f} s a step)",
        ]


def short_bytes(size: float) -> str:
    """A number of bytes in short: 1.430 GiB, 12.500 MiB."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 2**power:
            return f"{size / 2**power:,.3f} {unit}"
    return f"{size:,.0f} B"


def make_plan(
    experiment: Experiment, machine: Machine, memory: float | None = None, ranks: int | None = None
) -> Plan:
    """Simulate a step on `machine`; with `memory` (GiB), propose another mesh if it does not fit.

    `ranks`, in place of a mesh, selects the fastest mesh of so many that fits, else the last of
    those that are possible. Raises ConfigError for a mesh that cannot work, naming one of the same
    size that can.
    """
    experiment = _resolved(experiment)
    limit = machine.memory_gib if memory is None else memory
    if ranks is not None and ranks != experiment.mesh.size:
        if experiment.mesh.size != 1:
            raise ConfigError(
                f"--ranks {ranks}, but the mesh has {experiment.mesh.size} places.\n"
                "  Leave --ranks out, or the mesh, which is then chosen."
            )
        candidates = search(experiment, ranks, limit, machine)
        chosen = [candidate.experiment for candidate in candidates]
        experiment = chosen[0] if chosen else possible_meshes(experiment, ranks)[-1]
    _check_mesh(experiment)
    footprint = simulate(experiment)
    cost = estimate(machine, footprint.operations, footprint.traffic)
    plan = Plan(experiment, footprint, machine, cost, limit)
    if plan.fits or memory is None:
        return plan
    return replace(plan, proposal=propose(experiment, experiment.mesh.size, limit, machine))


def find_meshes(
    experiment: Experiment, devices: int, memory: float | None, machine: Machine
) -> list[Candidate]:
    """`search` with the machine's memory unless another is given."""
    limit = machine.memory_gib if memory is None else memory
    return search(_resolved(experiment), devices, limit, machine)


def search_text(candidates: list[Candidate], machine: Machine, memory: float) -> str:
    """The candidates as a table in text, fastest first."""
    if not candidates:
        return (
            f"No mesh fits in {memory:g} GiB with this batch and these settings.\n"
            "  Try more --devices, --activation-checkpointing or --kernels fast."
        )
    lines = [
        f"fits in {memory:g} GiB; seconds a step by formula on {machine.name}, without overlap",
        "  data  expert  model  micro-batches    peak GiB  GiB sent   seconds",
    ]
    for candidate in candidates:
        mesh, footprint = candidate.experiment.mesh, candidate.footprint
        sent = sum(item.sent for item in footprint.traffic)
        lines.append(
            f"  {mesh.data:>4} {mesh.expert:>7} {mesh.model:>6} "
            f"{candidate.experiment.micro_batches:>14} {footprint.peak / GIB:>11.2f} "
            f"{sent / GIB:>9.3f} {candidate.estimate.step:>9.4f}"
        )
    return "\n".join(lines)


def search_figures(candidates: list[Candidate]) -> list[dict[str, Any]]:
    """The candidates as plain numbers, for --json."""
    return [
        {
            "mesh": asdict(candidate.experiment.mesh),
            "micro_batches": candidate.experiment.micro_batches,
            "peak_bytes_per_rank": candidate.footprint.peak,
            "sent_bytes_per_rank": sum(item.sent for item in candidate.footprint.traffic),
            "step_seconds": candidate.estimate.step,
            "overlapped_step_seconds": candidate.estimate.overlapped,
            "flags": candidate.flags,
        }
        for candidate in candidates
    ]


def _resolved(experiment: Experiment) -> Experiment:
    """Machines are described in bfloat16, which is what "auto" means on all of them."""
    return experiment.resolved("bfloat16")


def _check_mesh(experiment: Experiment) -> None:
    try:
        check_fit(experiment.model, experiment.mesh)
    except ConfigError as error:
        try:
            mesh = possible_meshes(experiment, experiment.mesh.size)[0].mesh
        except ConfigError:
            raise error from None
        raise ConfigError(
            f"{error}\n  One of {mesh.size} that works: --mesh.data {mesh.data} --mesh.expert "
            f"{mesh.expert} --mesh.model {mesh.model}."
        ) from None
