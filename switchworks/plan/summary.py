"""What `explain --simulate`, `--search` and `--layout` print, as numbers and as text."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from switchworks.parallel import MeshConfig
from switchworks.plan.footprint import Footprint
from switchworks.plan.machines import Estimate, Machine, estimate
from switchworks.plan.weights import placement, shards_of_rank
from switchworks.training import Experiment

GIB = 2**30
MAX_RANKS = 4096
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
    memory: float
    """GiB of a device."""
    proposal: "Plan | None" = None
    """A mesh that fits, if this one does not."""

    @cached_property
    def estimate(self) -> Estimate:
        """Seconds of the step by the formula of `machines.py`."""
        return estimate(self.machine, self.footprint.operations, self.footprint.traffic)

    @property
    def fits(self) -> bool:
        """Whether the peak is within `memory`."""
        return self.footprint.peak <= self.memory * GIB

    @property
    def flags(self) -> str:
        """The flags that select this mesh and its micro-batches."""
        return f"{mesh_flags(self.experiment.mesh)} --micro-batches {self.experiment.micro_batches}"

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
                item._asdict() | {"sent": item.sent, "seconds": seconds}
                for item, seconds in zip(footprint.traffic, cost.by_traffic, strict=True)
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
        experiment, mesh = self.experiment, self.experiment.mesh
        sizes = [(f"  {name}", short_bytes(getattr(self.footprint, name))) for name in _SIZES]
        notes = zip(columns(sizes, left=1), _SIZES.values(), strict=True)
        lines = [
            f"one step of one rank, traced on {mesh.size} ranks = data {mesh.data} x expert "
            f"{mesh.expert} x model {mesh.model}, {experiment.micro_batches} micro-batches of "
            f"{experiment.micro_batch_size} rows",
            *(f"{size}  {note}".rstrip() for size, note in notes),
        ]
        return "\n".join(lines + self._traffic() + self._time() + self._fit())

    def _traffic(self) -> list[str]:
        if not self.footprint.traffic:
            return ["  no communication"]
        rows = [("  collective", "axis", "ranks", "calls", "payload", "sent", "seconds")]
        for item, time in zip(self.footprint.traffic, self.estimate.by_traffic, strict=True):
            sizes = short_bytes(item.bytes), short_bytes(item.sent)
            counts = str(item.ranks), str(item.calls)
            rows.append((f"  {item.collective}", item.axis, *counts, *sizes, f"{time:.4f}"))
        return columns(rows, left=2)

    def _time(self) -> list[str]:
        m, f, cost = self.machine, self.footprint, self.estimate
        return [
            f"  operations   {f.flops:.3e} FLOPs of matrix products, {short_bytes(f.moved)} read "
            "and written",
            f"  on {m.name}: {m.flops / 1e12:g} TFLOP/s at {m.efficiency:.0%}, memory "
            f"{m.memory_bandwidth / 1e9:g} GB/s, links {m.near / 1e9:g} GB/s in a node of {m.node} "
            f"and {m.far / 1e9:g} out of it, {m.latency * 1e6:g} us a call",
            f"  compute       {cost.compute:10.4f} s",
            f"  communication {cost.communication:10.4f} s",
            f"  step          {cost.overlapped:10.4f} s if all of that overlaps, {cost.step:.4f} s "
            "if nothing does (a formula, not a measurement: docs/scale.md)",
        ]

    def _fit(self) -> list[str]:
        peak, memory, proposal = self.footprint.peak / GIB, self.memory, self.proposal
        if self.fits:
            return [f"  fits in {memory:g} GiB: {peak:.2f} at the peak"]
        lines = [f"  does not fit: {peak:.2f} GiB at the peak, and a device has {memory:g}."]
        if proposal is None:
            note = f"  No mesh of up to {MAX_RANKS} ranks fits this batch and these settings."
            return [*lines, note]
        size, step = proposal.footprint.peak / GIB, proposal.estimate.step
        lines.append(f"  {proposal.experiment.mesh.size} ranks do: {proposal.flags}")
        return [*lines, f"  ({size:.2f} GiB, {step:.4f} s a step)"]


def mesh_flags(mesh: MeshConfig) -> str:
    """The flags that select `mesh`."""
    return f"--mesh.data {mesh.data} --mesh.expert {mesh.expert} --mesh.model {mesh.model}"


def columns(rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Rows of a table as lines: the first `left` columns flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = "<" * left + ">" * (len(widths) - left)
    line = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return [line.format(*row) for row in rows]


def short_bytes(size: float) -> str:
    """A number of bytes in short: 1.430 GiB, 12.500 MiB."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 2**power:
            return f"{size / 2**power:,.3f} {unit}"
    return f"{size:,.0f} B"


def search_text(plans: Sequence[Plan], machine: Machine, memory: float) -> str:
    """Meshes that fit as a table in text, fastest first."""
    if not plans:
        return (
            f"No mesh fits in {memory:g} GiB with this batch and these settings.\n"
            "  Try more --devices, --activation-checkpointing or --kernels fast."
        )
    rows = [["  data", "expert", "model", "micro-batches", "peak GiB", "GiB sent", "seconds"]]
    for plan in plans:
        mesh, footprint = plan.experiment.mesh, plan.footprint
        counts = mesh.data, mesh.expert, mesh.model, plan.experiment.micro_batches
        sizes = f"{footprint.peak / GIB:.2f}", f"{footprint.sent / GIB:.3f}"
        rows.append([*map(str, counts), *sizes, f"{plan.estimate.step:.4f}"])
    head = f"fits in {memory:g} GiB; seconds a step by formula on {machine.name}, without overlap"
    return "\n".join([head, *columns(rows, left=0)])


def search_figures(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """Meshes that fit as plain numbers, for --json."""
    return [
        {
            "mesh": asdict(plan.experiment.mesh),
            "micro_batches": plan.experiment.micro_batches,
            "peak_bytes_per_rank": plan.footprint.peak,
            "sent_bytes_per_rank": plan.footprint.sent,
            "step_seconds": plan.estimate.step,
            "overlapped_step_seconds": plan.estimate.overlapped,
            "flags": plan.flags,
        }
        for plan in plans
    ]


def layout_table(experiment: Experiment) -> str:
    """The weights of `experiment` as a table in text: letters, placement, MiB per rank."""
    rows = [("weight", "letters", "shape", "placement", "MiB per rank")]
    shards = shards_of_rank(experiment)
    for weight in shards:
        name = weight.name + (f"  ({weight.count})" if weight.count > 1 else "")
        shape, place = " x ".join(map(str, weight.shape)), placement(weight, experiment.mesh)
        rows.append((name, weight.letters or "-", shape, place, f"{weight.bytes / 2**20:,.3f}"))
    total = sum(weight.bytes for weight in shards)
    rows.append(("all weights", "", "", "", f"{total / 2**20:,.3f}"))
    return "\n".join(columns(rows, left=4))
