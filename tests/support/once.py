"""What several tests read is made once, by the first of all processes that asks for it."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock

if TYPE_CHECKING:
    from switchworks.training import Experiment


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, which `make` writes unless an earlier call, here or in another process, has."""
    done = path.with_name(f"{path.name}.done")
    with FileLock(f"{path}.lock"):
        if not done.exists():
            shutil.rmtree(path, ignore_errors=True)  # left by a call that failed
            make(path)
            done.touch()
    return path


def trained_once(folder: Path, experiment: "Experiment") -> Path:
    """A finished run of `experiment`, somewhere in `folder`."""
    from switchworks.config import to_toml
    from switchworks.training import train

    name = hashlib.sha256(to_toml(experiment).encode()).hexdigest()[:16]

    def make(run_dir: Path) -> None:
        threads = torch.get_num_threads()
        train(experiment, run_dir)
        torch.set_num_threads(threads)

    return made_once(folder / f"run_{name}", make)
