"""Where models compute, and how long they take."""

import time
from collections.abc import Callable, Sequence

import torch


def compute_device() -> torch.device:
    """The GPU if torch sees one, else the processor. `CUDA_VISIBLE_DEVICES=` hides GPUs. On a mesh
    each rank has made the GPU of its own current, and "cuda" means that one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def take_turns(works: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each: once to warm up, then A B A B ... `rounds` times each. So a machine that
    slows down slows all."""
    for work in works:
        work()
    turns = [[seconds(work) for work in works] for _ in range(rounds)]
    return [list(taken) for taken in zip(*turns, strict=True)]
