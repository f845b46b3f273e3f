"""Training in a process of its own, slowed down so that it can be caught in the middle."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from switchworks.training import Experiment, loop, train

SCRIPT = """
import json
import sys
import time
from pathlib import Path
from switchworks.config import from_toml
from switchworks.training import Experiment, train
from switchworks.training import loop

settings, run_dir, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
step = loop.train_step
def slower(state, batch):
    time.sleep(pause)
    with run_dir.with_suffix(".targets").open("a") as file:
        file.write(json.dumps([state.step, batch.targets.tolist()]) + "\\n")
    return step(state, batch)
loop.train_step = slower
try:
    train(from_toml(Experiment, settings), run_dir, resume="--resume" in sys.argv)
except Exception as error:
    print(type(error).__name__, error)
    raise SystemExit(3)
"""


def train_noting_targets(experiment: Experiment, run_dir: Path, **more: Any) -> None:
    """Trains in this process and notes the targets, as a process of `start` does."""
    step = loop.train_step

    def noting(state: Any, batch: Any) -> Any:
        with run_dir.with_suffix(".targets").open("a") as file:
            file.write(json.dumps([state.step, batch.targets.tolist()]) + "\n")
        return step(state, batch)

    with patch.object(loop, "train_step", noting):
        train(experiment, run_dir, **more)


def start(experiment_file: Path, run_dir: Path, pause: float, *more: str) -> subprocess.Popen:
    """Begins to train, with `pause` seconds before each step."""
    command = [sys.executable, "-c", SCRIPT, str(experiment_file), str(run_dir), str(pause), *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


def targets_of(run_dir: Path) -> list[tuple[int, list[list[int]]]]:
    """The step and the targets of every batch it trained on, those repeated after a kill too."""
    lines = run_dir.with_suffix(".targets").read_text().splitlines()
    return [tuple(json.loads(line)) for line in lines]
