"""The device mesh, and the collectives of plain numbers that a training loop needs.

The axes are (data, expert, model), the last one innermost, so that ranks which share a layer's
width are neighbours. Data and expert together are the batch axis: each of its ranks has its own
rows of a batch.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from switchworks.config import ConfigError
from switchworks.device import compute_device
from switchworks.parallel import torchrun
from switchworks.parallel.layout import MeshConfig

AXES = ("data", "expert", "model")


def build_mesh(config: MeshConfig, device_type: str = "cpu") -> DeviceMesh:
    """The mesh of `config` over all ranks of the default process group."""
    mesh = init_device_mesh(
        device_type, (config.data, config.expert, config.model), mesh_dim_names=AXES
    )
    batch_axis(mesh)  # every rank has to create its process group at the same time
    return mesh


def batch_axis(mesh: DeviceMesh) -> DeviceMesh:
    """The data and the expert axis of `mesh` as one; created once and then reused."""
    return mesh["data", "expert"]._flatten("batch")


class Ranks:
    """All ranks of a run as seen by one of them; without a mesh it is the only one.

    Every method is a collective: all ranks call it in the same order.
    """

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        self.mesh = mesh
        self.batch = None if mesh is None else batch_axis(mesh)
        self.batch_rank = 0 if self.batch is None else self.batch.get_local_rank()
        """Index of this rank's part of a batch."""
        self.batch_world = 1 if self.batch is None else self.batch.size()
        """Parts of a batch."""
        self.is_main = mesh is None or mesh.get_rank() == 0
        """Whether this rank prints and writes files."""
        self.device = compute_device() if mesh is None else torch.device(mesh.device_type)
        """The device of this rank's model."""

    def all_sum(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over the batch axis."""
        if self.batch is None:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.batch.device_type)
        dist.all_reduce(sums, group=self.batch.get_group())
        return sums.tolist()

    def all_max(self, value: int) -> int:
        """The maximum of `value` over all ranks."""
        if self.mesh is None:
            return value
        maximum = torch.tensor(value, device=self.mesh.device_type)
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
        return int(maximum)

    def all_gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, in rank order; anything that can be pickled."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.mesh.size()
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.mesh is not None:
            dist.barrier()


SINGLE = Ranks()
"""The only rank of a run without a mesh."""


@contextmanager
def connect_ranks(config: MeshConfig, world: int) -> Iterator[Ranks]:
    """Inside, the `world` processes that torchrun started are connected as the mesh of `config`.

    Raises ConfigError unless `world` is the size of the mesh. A process group that exists already
    is used and left as it is.
    """
    if world != config.size:
        raise ConfigError(_wrong_world(config, world))
    if config.size == 1:
        yield SINGLE
        return
    device = compute_device().type
    create = not dist.is_initialized()
    if create:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torchrun.init_process_group("nccl" if device == "cuda" else "gloo", config.timeout)
    yield Ranks(build_mesh(config, device))
    if create:
        dist.barrier()  # gloo may abort a rank whose peer closes its connection first
        dist.destroy_process_group()


def _wrong_world(config: MeshConfig, world: int) -> str:
    mesh = f"mesh = data {config.data} x expert {config.expert} x model {config.model}"
    if world == 1:
        return (
            f"{mesh} needs {config.size} processes and there is one.\n"
            f"  Start them: torchrun --nproc-per-node {config.size} -m switchworks train ..."
        )
    data = world // (config.expert * config.model)
    fits = data * config.expert * config.model == world
    flag = f"--mesh.data {data}" if fits else f"--mesh.data {world} --mesh.expert 1 --mesh.model 1"
    return f"{mesh} has {config.size} places, but {world} processes were started.\n  Set {flag}."
