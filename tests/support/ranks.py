"""Run a function in real gloo processes, and the small runs that are compared across meshes."""

import faulthandler
import multiprocessing
import os
import pickle
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.tensor import DTensor

from switchworks.batch import Batch
from switchworks.data.config import DataConfig
from switchworks.model import ModelConfig, RoutingConfig
from switchworks.model.init import initialise
from switchworks.model.transformer import SwitchTransformer
from switchworks.optim.config import OptimConfig
from switchworks.parallel import SINGLE, MeshConfig, Ranks, build_mesh
from switchworks.training import Experiment
from switchworks.training.state import TrainState, build_state
from switchworks.training.step import train_step


def spawn(world: int, work: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What `work(rank, *arguments)` returns in each of `world` processes that form a group.

    An error in one of them is raised here.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin = (world, port, str(folder), work, arguments)
    multiprocessing.set_forkserver_preload([__name__])  # torch is imported once, not by every rank
    torch.multiprocessing.start_processes(
        _one_rank, args=begin, nprocs=world, start_method="forkserver"
    )
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(world)]


def _one_rank(
    rank: int, world: int, port: int, folder: str, work: Callable, arguments: tuple
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    faulthandler.enable()  # a rank that dies of a signal says where it was
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    result = work(rank, *arguments)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def torchrun(run_dir: Path, corpus: Path, *more: str, launch: tuple[str, ...] = ()) -> list[str]:
    """The command for the tiny recipe with an expert axis of two; `launch` is for torchrun."""
    begin = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *launch]
    begin += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    flags = ["--data.path", str(corpus), "--run-dir", str(run_dir), "--threads", "1"]
    return [*begin, "-m", "switchworks", "train", "tiny", *flags, "--mesh.expert", "2", *more]


STEPS = 3
ROWS, INPUTS, TARGETS, WORDS = 8, 16, 8, 64


@dataclass(frozen=True)
class Case:
    """A small run: a mesh and what is special about it."""

    mesh: MeshConfig = field(default_factory=MeshConfig)
    capacity_factor: float | None = 1.0
    precision: str = "float64"
    optimizer: str = "adafactor"
    more: tuple[tuple[str, Any], ...] = ()
    """Settings of the experiment, of `optim.` or `model.` or `routing.`, by their dotted names."""

    def experiment(self) -> Experiment:
        """Its settings. No noise, which is drawn rank by rank."""
        routing = RoutingConfig(
            experts=4,
            group_sequences=2,
            capacity_factor=self.capacity_factor,
            min_capacity=1,
            jitter=0.0,
            z_weight=1e-3,
        )
        model = ModelConfig(
            vocab_size=WORDS, d_model=16, d_ff=32, d_kv=4, num_heads=4, num_layers=2, init_scale=4.0
        )
        adamw = self.optimizer == "adamw"
        optim = OptimConfig(
            name=self.optimizer,
            lr=1e-2,
            schedule="constant",
            warmup_steps=0,
            betas=(0.9, 0.99),
            eps=1e-3 if adamw else 1e-8,  # else the sign of a rounding error moves a weight by lr
            clip_norm=0.5,
            min_factored_dim=8,
            weight_decay=0.1,
        )
        # Of this seed tokens are dropped, loads uneven and gradients clipped: see test_parallel.py.
        groups = {"": {"seed": 6}, "optim": {}, "model": {}, "routing": {}}
        for name, value in self.more:
            group, _, leaf = name.rpartition(".")
            groups[group][leaf] = value
        routing = replace(routing, **groups["routing"])
        return Experiment(
            name="case",
            steps=STEPS,
            batch_size=ROWS,
            precision=self.precision,
            mesh=self.mesh,
            model=replace(model, **({"routing": routing} | groups["model"])),
            optim=replace(optim, **groups["optim"]),
            data=DataConfig(input_length=INPUTS, target_length=TARGETS),
            **groups[""],
        )


def batch_of(step: int, ranks: Ranks = SINGLE) -> Batch:
    """This rank's rows of the batch at `step`: rows of unequal lengths, one without any target."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randint(1, WORDS, (ROWS, INPUTS), generator=generator)
    targets = torch.randint(1, WORDS, (ROWS, TARGETS), generator=generator)
    inputs[1, 9:], inputs[6, 2:], targets[0, 3:], targets[5, :] = 0, 0, 0, 0
    share = ROWS // ranks.batch_world
    rows = torch.arange(ranks.batch_rank * share, (ranks.batch_rank + 1) * share)
    return Batch(inputs=inputs, targets=targets).take(rows)


def state_of(case: Case) -> TrainState:
    """Step 0: the same weights for every mesh and every precision."""
    experiment = case.experiment()
    ranks = SINGLE if case.mesh.size == 1 else Ranks(build_mesh(case.mesh))
    model = SwitchTransformer(experiment.model)
    initialise(model, experiment.seed)
    if case.precision == "float64":
        model.double()
    return build_state(experiment, model, ranks=ranks)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def run_case(case: Case, steps: int = STEPS) -> dict[str, Any]:
    """What came of it: losses, the last gradients, all state, and the layers' reports."""
    state, found = state_of(case), {"loss": [], "norm": [], "dropped": [], "load": []}
    update = state.updater.step

    def spy(*arguments: int) -> Any:
        if len(found["loss"]) == steps - 1:
            found["gradients"] = {
                n: whole(g) for n, g in sorted(state.updater.masters.gradients().items())
            }
        return update(*arguments)

    state.updater.step = spy
    for step in range(steps):
        result = train_step(state, batch_of(step, state.ranks))
        found["loss"].append(result.total)
        found["norm"].append(result.update.grad_norm)
        found["dropped"].append([layer.dropped for layer in result.layers.values()])
        found["load"].append([layer.load for layer in result.layers.values()])
    saved = state.state_dict()
    found["weights"] = {name: whole(weight) for name, weight in saved["weights"].items()}
    found["optimizer"] = {
        f"{name} {slot}": whole(value)
        for name, slots in saved["optimizer"].items()
        for slot, value in slots.items()
    }
    return found


def run_cases(rank: int, cases: list[Case]) -> dict[Case, dict[str, Any]]:
    return {case: run_case(case) for case in cases}
