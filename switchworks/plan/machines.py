"""Time of a step from what a rank computes and sends: the formula of docs/scale.md."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from switchworks.config import ConfigError, check_positive, from_toml
from switchworks.plan.trace import Operation, Traffic


@dataclass(frozen=True)
class Machine:
    """What one device of a `node` of several does by its maker's figures; links count one
    direction."""

    name: str
    flops: float
    """Matrix products in bfloat16, operations per second."""
    memory_gib: float
    memory_bandwidth: float
    """Bytes per second."""
    node: int
    near: float
    """Bytes per second a device sends inside a node."""
    far: float
    """Bytes per second a device sends out of it."""
    latency: float = 2e-5
    """Seconds before a collective moves anything."""
    efficiency: float = 0.5
    """Share of `flops` that matrix products reach."""

    def __post_init__(self) -> None:
        positive = ("flops", "memory_gib", "memory_bandwidth", "node", "near", "far")
        check_positive(self, "machine ", *positive)
        if not 0 < self.efficiency <= 1:
            raise ConfigError(
                f"efficiency = {self.efficiency} must lie in (0, 1].\n  0.5 is usual."
            )


MACHINES = {
    "tpuv3": Machine("TPUv3-like core", 61.5e12, 16.0, 450e9, node=2048, near=140e9, far=3e9),
    "a100": Machine("A100 80 GB, 8 to a node", 312e12, 80.0, 2.0e12, node=8, near=300e9, far=25e9),
    "h100": Machine("H100 80 GB, 8 to a node", 989e12, 80.0, 3.35e12, node=8, near=450e9, far=50e9),
}
"""tpuv3 is half a chip (123 TFLOP/s, 32 GiB, 900 GB/s, four links of 70 GB/s) in a pod of 1024.
The others: dense bfloat16, NVLink in one direction, one network card of 200 or 400 Gb/s each."""


def find_machine(name: str) -> Machine:
    """A preset, or the machine in a TOML file with the settings of `Machine`."""
    if name in MACHINES:
        return MACHINES[name]
    if Path(name).suffix == ".toml":
        return from_toml(Machine, Path(name))
    raise ConfigError(
        f"There is no machine {name!r}. Machines: {', '.join(MACHINES)}.\n"
        "  Your own: a .toml file with name, flops, memory_gib, memory_bandwidth, node, near, far."
    )


@dataclass(frozen=True)
class Estimate:
    """Seconds of one step; `by_traffic` of each `Traffic`, in the order given."""

    compute: float
    by_traffic: tuple[float, ...]

    @property
    def communication(self) -> float:
        """Seconds of all collectives."""
        return sum(self.by_traffic)

    @property
    def step(self) -> float:
        """Seconds without overlap."""
        return self.compute + self.communication

    @property
    def overlapped(self) -> float:
        """Seconds if communication hides behind compute, or the other way round."""
        return max(self.compute, self.communication)


def estimate(
    machine: Machine, operations: Mapping[Operation, int], traffic: Iterable[Traffic]
) -> Estimate:
    """Time of the `operations`, each with its count, and the `traffic` of one rank."""
    peak, bandwidth = machine.efficiency * machine.flops, machine.memory_bandwidth
    compute = sum(
        count * max(operation.flops / peak, operation.bytes / bandwidth)
        for operation, count in operations.items()
    )
    return Estimate(compute, tuple(seconds(machine, item) for item in traffic))


def seconds(machine: Machine, traffic: Traffic) -> float:
    """Time of all calls of one collective. Other groups of its axis are taken to be as far apart
    as rank 0's."""
    if traffic.ranks == 1:
        return 0.0
    link = machine.near if traffic.span < machine.node else machine.far
    return traffic.sent / link + traffic.calls * machine.latency
