"""The mesh of ranks, and what ranks have to agree on.

The axes are (data, expert, model), the last one innermost, so that ranks which share a layer's
width are neighbours. Data and expert together are the batch axis: each of its ranks has rows of
its own.
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
from switchworks.parallel import torchrun as launch
from switchworks.parallel.config import MeshConfig

AXES = ("data", "expert", "model")


def build_mesh(config: MeshConfig, device_type: str = "cpu") -> DeviceMesh:
    """The mesh of `config` over all ranks there are, with its batch axis made ready."""
    mesh = init_device_mesh(
        device_type, (config.data, config.expert, config.model), mesh_dim_names=AXES
    )
    batch_axis(mesh)
    return mesh


def batch_axis(mesh: DeviceMesh) -> DeviceMesh:
    """The data and the expert axis of `mesh` as one, made when it is first asked for."""
    return mesh["data", "expert"]._flatten("batch")


class Ranks:
    """The ranks that train together, as one of them sees them. Without a mesh it is alone.

    Every method is to be called by all of them, in the same order.
    """

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        self.mesh = mesh
        self.batch = None if mesh is None else batch_axis(mesh)
        self.batch_rank = 0 if self.batch is None else self.batch.get_local_rank()
        """Which part of a batch is its own."""
        self.batch_world = 1 if self.batch is None else self.batch.size()
        self.is_main = mesh is None or mesh.get_rank() == 0
        """Whether it is the one that talks and writes."""
        self.device = compute_device() if mesh is None else torch.device(mesh.device_type)
        """Where its model computes."""

    def all_sum(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over the parts of a batch."""
        if self.batch is None:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.batch.device_type)
        dist.all_reduce(sums, group=self.batch.get_group())
        return sums.tolist()

    def all_max(self, value: int) -> int:
        """The largest value that any rank has."""
        if self.mesh is None:
            return value
        found = torch.tensor(value, device=self.mesh.device_type)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def all_gather(self, value: Any) -> list[Any]:
        """What every rank has, in their order."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.mesh.size()
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Returns when all ranks are here."""
        if self.mesh is not None:
            dist.barrier()


SINGLE = Ranks()


@contextmanager
def ranks_of(config: MeshConfig, world: int) -> Iterator[Ranks]:
    """The ranks of `config` among the `world` processes that torchrun started, for the block.

    Raises ConfigError unless there are as many as the mesh has places. A process group that is
    there already is used and left as it is.
    """
    if world != config.size:
        raise ConfigError(_wrong_world(config, world))
    if config.size == 1:
        yield SINGLE
        return
    device = compute_device().type
    begun = not dist.is_initialized()
    if begun:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        launch.begin("nccl" if device == "cuda" else "gloo", config.timeout)
    yield Ranks(build_mesh(config, device))
    if begun:
        dist.barrier()  # without it gloo may abort whoever is still listening
        dist.destroy_process_group()


def _wrong_world(config: MeshConfig, world: int) -> str:
    mesh = f"mesh = data {config.data} x expert {config.expert} x model {config.model}"
    if world == 1:
        return (
            f"{mesh} needs {config.size} processes and there is one.\n"
            f"  Start them: torchrun --nproc-per-node {config.size} -m switchworks train ..."
        )
    rest = world // (config.expert * config.model)
    fits = rest * config.expert * config.model == world
    flag = f"--mesh.data {rest}" if fits else f"--mesh.data {world} --mesh.expert 1 --mesh.model 1"
    return f"{mesh} has {config.size} places, but {world} processes were started.\n  Set {flag}."
