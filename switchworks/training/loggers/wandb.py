"""Weights & Biases. WANDB_MODE=offline keeps everything in wandb/ of the run directory."""

import os
from collections.abc import Mapping
from typing import Any

from switchworks.config import to_dict
from switchworks.training.loggers.logger import RunInfo, require_package


class WandB:
    """Logs to the project that WANDB_PROJECT names, else "switchworks"."""

    def __init__(self) -> None:
        """Raises ConfigError if wandb is not installed."""
        self.wandb = require_package("wandb")

    def start(self, run: RunInfo) -> None:
        """A resumed run goes on under its id."""
        self.info = run
        self.run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", "switchworks"),
            dir=str(run.directory),
            id=run.info["id"],
            name=f"{run.experiment.name}-{run.info['id']}",
            config=to_dict(run.experiment),
            resume="allow",
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log what no earlier session has."""
        if numbers := self.info.new_numbers(step, values):
            self.run.log(numbers, step=step)

    def close(self) -> None:
        """Returns when everything is uploaded or, offline, on the disk."""
        self.run.finish()
