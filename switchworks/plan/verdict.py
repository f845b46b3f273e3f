"""What `explain --simulate` and `explain --search` say, as plain numbers and as lines."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from switchworks.config import ConfigError
from switchworks.parallel import check_fit
from switchworks.plan.footprint import Footprint
from switchworks.plan.machines import Estimate, Machine, estimate, seconds
from switchworks.plan.search import GIB, Candidate, propose, search, workable
from switchworks.plan.simulate import simulate
from switchworks.training import Experiment


@dataclass(frozen=True)
class Plan:
    """A simulated step on a machine."""

    experiment: Experiment
    footprint: Footprint
    machine: Machine
    estimate: Estimate
    memory: float
    """GiB that a device has."""
    better: Candidate | None = None
    """A mesh that fits, where this one does not."""

    @property
    def fits(self) -> bool:
        """Whether the peak is within the memory."""
        return self.footprint.peak <= self.memory * GIB

    def figures(self) -> dict[str, Any]:
        """Everything as plain numbers, for --json."""
        footprint, cost = self.footprint, self.estimate
        sizes = ("weights", "masters", "gradients", "optimizer", "activations", "peak")
        return {
            "mesh": asdict(self.experiment.mesh),
            "micro_batches": self.experiment.micro_batches,
            "parameter_bytes_per_rank": footprint.weights,
            "bytes_per_rank": {name: getattr(footprint, name) for name in sizes},
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
                "computing_seconds": cost.computing,
                "travelling_seconds": cost.travelling,
                "step_seconds": cost.step,
                "overlapped_step_seconds": cost.overlapped,
            },
            "proposal": None if self.better is None else self.better.flags,
        }

    def text(self) -> str:
        """The same for people."""
        return "\n".join([*self._memory(), *self._traffic(), *self._time(), *self._verdict()])

    def _memory(self) -> list[str]:
        mesh, footprint = self.experiment.mesh, self.footprint
        lines = [
            f"one step of one rank, traced on {mesh.size} ranks = data {mesh.data} x expert "
            f"{mesh.expert} x model {mesh.model}, {self.experiment.micro_batches} micro-batches of "
            f"{self.experiment.micro_batch_size} rows"
        ]
        about = {
            "weights": "the model computes with them",
            "masters": "float32 beside bfloat16",
            "gradients": "",
            "optimizer": "",
            "activations": "at their peak, and all else that comes and goes",
            "peak": "all of it at once, where that is most",
        }
        for name, words in about.items():
            lines.append(f"  {name:<12} {in_bytes(getattr(footprint, name)):>11}  {words}".rstrip())
        return lines

    def _traffic(self) -> list[str]:
        lines = ["  collective      axis      ranks    calls     payload        sent   seconds"]
        lines += [
            f"  {item.collective:<15} {item.axis:<8} {item.ranks:>6} {item.calls:>8} "
            f"{in_bytes(item.bytes):>11} {in_bytes(item.sent):>11} {time:>9.4f}"
            for item, time in zip(self.footprint.traffic, self.estimate.by_traffic, strict=True)
        ]
        return lines if self.footprint.traffic else ["  nothing travels"]

    def _time(self) -> list[str]:
        m, f, cost = self.machine, self.footprint, self.estimate
        return [
            f"  work         {f.flops:.3e} FLOPs of matrix products, {in_bytes(f.moved)} read and "
            "written",
            f"  on {m.name}: {m.flops / 1e12:g} TFLOP/s at {m.efficiency:.0%}, memory "
            f"{m.memory_bandwidth / 1e9:g} GB/s, links {m.near / 1e9:g} GB/s in a node of {m.node} "
            f"and {m.far / 1e9:g} out of it, {m.latency * 1e6:g} us a call",
            f"  computing    {cost.computing:10.4f} s  = sum over operations of max(FLOPs / "
            "(efficiency x peak), bytes / memory bandwidth)",
            f"  travelling   {cost.travelling:10.4f} s  = sum over collectives of bytes sent / link"
            " + calls x latency",
            f"  step         {cost.overlapped:10.4f} s if all of that overlaps, {cost.step:.4f} s "
            "if nothing does (a formula, not a measurement)",
        ]

    def _verdict(self) -> list[str]:
        peak, memory = self.footprint.peak / GIB, self.memory
        if self.fits:
            return [f"  fits in {memory:g} GiB: {peak:.2f} at the peak"]
        lines = [f"  does not fit: {peak:.2f} GiB at the peak, and a device has {memory:g}."]
        if self.better is None:
            return [*lines, "  No mesh of up to 4096 ranks fits this batch and these settings."]
        found = self.better
        return [
            *lines,
            f"  {found.experiment.mesh.size} ranks do: {found.flags}",
            f"  ({found.footprint.peak / GIB:.2f} GiB, {found.estimate.step:.4f} s a step)",
        ]


def in_bytes(size: float) -> str:
    """Bytes for people: 1.43 GiB, 12.5 MiB."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 2**power:
            return f"{size / 2**power:,.3f} {unit}"
    return f"{size:,.0f} B"


def make_plan(
    experiment: Experiment, machine: Machine, memory: float | None = None, ranks: int | None = None
) -> Plan:
    """Simulate a step and say what it takes; where it does not fit, look for a mesh that does.

    `ranks` in place of a mesh takes the fastest mesh of so many, or the least hungry if none fits.
    Raises ConfigError for a mesh that cannot work, with one of the same size that can.
    """
    experiment = _settled(experiment)
    limit = machine.memory_gib if memory is None else memory
    if ranks is not None and ranks != experiment.mesh.size:
        if experiment.mesh.size != 1:
            raise ConfigError(
                f"--ranks {ranks}, but the mesh has {experiment.mesh.size} places.\n"
                "  Leave --ranks out, or the mesh, which is then chosen."
            )
        experiment = _chosen(experiment, ranks, limit, machine)
    _check(experiment)
    footprint = simulate(experiment)
    cost = estimate(machine, footprint.work, footprint.traffic)
    plan = Plan(experiment, footprint, machine, cost, limit)
    if plan.fits or memory is None:
        return plan
    return replace(plan, better=propose(experiment, experiment.mesh.size, limit, machine))


def search_text(candidates: list[Candidate], machine: Machine, memory: float) -> str:
    """The candidates, fastest first, as lines for people."""
    if not candidates:
        return (
            f"No mesh fits in {memory:g} GiB with this batch and these settings.\n"
            "  Try more --devices, --activation-checkpointing or --kernels fast."
        )
    lines = [
        f"fits in {memory:g} GiB; seconds a step by formula on {machine.name}, nothing overlapping",
        "  data  expert  model  micro-batches    peak GiB  GiB sent   seconds",
    ]
    for found in candidates:
        mesh, parts = found.experiment.mesh, found.experiment.micro_batches
        sent = sum(item.sent for item in found.footprint.traffic)
        lines.append(
            f"  {mesh.data:>4} {mesh.expert:>7} {mesh.model:>6} {parts:>14}"
            f" {found.footprint.peak / GIB:>11.2f} {sent / GIB:>9.3f} {found.estimate.step:>9.4f}"
        )
    return "\n".join(lines)


def search_figures(candidates: list[Candidate]) -> list[dict[str, Any]]:
    """The same as plain numbers."""
    return [
        {
            "mesh": asdict(found.experiment.mesh),
            "micro_batches": found.experiment.micro_batches,
            "peak_bytes_per_rank": found.footprint.peak,
            "sent_bytes_per_rank": sum(item.sent for item in found.footprint.traffic),
            "step_seconds": found.estimate.step,
            "overlapped_step_seconds": found.estimate.overlapped,
            "flags": found.flags,
        }
        for found in candidates
    ]


def find_meshes(
    experiment: Experiment, devices: int, memory: float | None, machine: Machine
) -> list[Candidate]:
    """`search`, in the memory that the machine has unless another is given."""
    limit = machine.memory_gib if memory is None else memory
    return search(_settled(experiment), devices, limit, machine)


def _settled(experiment: Experiment) -> Experiment:
    """Machines are described in bfloat16, which "auto" is on all of them."""
    return experiment.resolved("bfloat16")


def _chosen(experiment: Experiment, ranks: int, memory: float, machine: Machine) -> Experiment:
    found = search(experiment, ranks, memory, machine)
    return found[0].experiment if found else workable(experiment, ranks)[-1]


def _check(experiment: Experiment) -> None:
    try:
        check_fit(experiment.model, experiment.mesh)
    except ConfigError as error:
        try:
            mesh = workable(experiment, experiment.mesh.size)[0].mesh
        except ConfigError:
            raise error from None
        raise ConfigError(
            f"{error}\n  One of {mesh.size} that works: --mesh.data {mesh.data} --mesh.expert "
            f"{mesh.expert} --mesh.model {mesh.model}."
        ) from None
