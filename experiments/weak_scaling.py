"""Weak scaling: N processes with N times the rows against one, one thread each.

    python experiments/weak_scaling.py [RECIPE] [--processes 2] [--axis expert] [--rows 64]

Trains a recipe (default quickstart, float32) on random tokens, so no text is needed, with the same
number of rows in each process. Prints the median time of a step, the efficiency (time of one
process / time of N), and the share of a step in which a collective is under way, time spent waiting
for other processes included. "independent" are N processes that run at the same time and do not
communicate: their slowdown is the machine's. Give every process its own core, or the figures mean
nothing.
"""

import argparse
import os
import socket
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.profiler import ProfilerActivity, profile

from switchworks.batch import Batch
from switchworks.parallel import SINGLE, MeshConfig, Ranks, build_mesh
from switchworks.recipes import find_recipe
from switchworks.training import Experiment, build_state, train_step

WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--axis", choices=("data", "expert", "model"), default="expert")
    parser.add_argument("--rows", type=int, help="of each process; default: the recipe's batch")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--overlap", type=int, default=1, help="mesh.overlap")
    flags = parser.parse_args()
    flags.rows = flags.rows or find_recipe(flags.recipe)().batch_size
    print("processes       s/step  efficiency  communicating")
    baseline = None
    for world, together in ((1, False), (flags.processes, False), (flags.processes, True)):
        seconds, share = measure(world, flags, together=together)
        baseline = baseline or seconds
        name = f"{world}" if together or world == 1 else f"{world}, independent"
        print(f"{name:<14}  {seconds:6.3f}  {baseline / seconds:10.1%}  {share:13.1%}", flush=True)


def measure(world: int, flags: argparse.Namespace, *, together: bool) -> tuple[float, float]:
    """Seconds of a step in `world` processes, a mesh if `together`, and the share of them in which
    a collective is under way."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        file = Path(folder, "figures")
        torch.multiprocessing.start_processes(
            one_rank, args=(world, port, flags, file, together), nprocs=world, start_method="spawn"
        )
        seconds, share = map(float, file.read_text().split())
    return seconds, share


def one_rank(
    rank: int, world: int, port: int, flags: argparse.Namespace, file: Path, together: bool
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    mesh = MeshConfig()
    ranks = SINGLE
    if together:
        mesh = MeshConfig(**{flags.axis: world}, overlap=flags.overlap)
        dist.init_process_group("gloo", rank=rank, world_size=world)
        ranks = Ranks(build_mesh(mesh))
    experiment = replace(
        find_recipe(flags.recipe)(),
        batch_size=flags.rows * mesh.batch,
        micro_batches=1,
        precision="float32",
        mesh=mesh,
    )
    state = build_state(experiment, ranks=ranks)
    times = []
    for step in range(WARM_UP + flags.steps):
        started = time.perf_counter()
        train_step(state, random_rows(experiment, flags.rows, seed=step * world + ranks.batch_rank))
        times.append(time.perf_counter() - started)
    share = share_of_collectives(lambda: train_step(state, random_rows(experiment, flags.rows, 0)))
    if rank == 0:
        file.write_text(f"{statistics.median(times[WARM_UP:])} {share}")
    if together:
        dist.barrier()
        dist.destroy_process_group()


def random_rows(experiment: Experiment, rows: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    words, data = experiment.model.vocab_size, experiment.data
    inputs = torch.randint(3, words, (rows, data.input_length), generator=generator)
    targets = torch.randint(3, words, (rows, data.target_length), generator=generator)
    return Batch(inputs=inputs, targets=targets)


def share_of_collectives(step) -> float:
    """The share of a step in which at least one collective runs: the union of gloo's spans."""
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    seconds = time.perf_counter() - started
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.name.startswith("gloo:")
    )
    covered, last = 0.0, 0.0
    for begin, end in spans:
        covered += max(0.0, end - max(begin, last))
        last = max(last, end)
    return covered / 1e6 / seconds


if __name__ == "__main__":
    main()
