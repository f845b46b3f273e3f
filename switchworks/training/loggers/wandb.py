"""Weights & Biases, and Trackio, which has the same interface and keeps everything on this machine.

WANDB_MODE=offline keeps wandb's files in wandb/ of the run directory. WANDB_PROJECT and
TRACKIO_PROJECT name the project, "switchworks" unless they are set.
"""

import os
from collections.abc import Mapping
from typing import Any

from switchworks.config import to_dict
from switchworks.training.loggers.logger import RunInfo, require_package


class WandB:
    """Logs every number; a resumed run continues under its id."""

    def __init__(self, package: str = "wandb") -> None:
        """Raises ConfigError if `package`, wandb or trackio, is not installed."""
        self.name = package
        self.package = require_package(package)

    def start(self, run: RunInfo) -> None:
        """Open the run, or the same run again."""
        self.info, key = run, run.info["id"]
        settings = {"wandb": {"id": key, "dir": str(run.directory)}, "trackio": {"embed": False}}
        self.run = self.package.init(
            project=os.environ.get(f"{self.name.upper()}_PROJECT", "switchworks"),
            name=f"{run.experiment.name}-{key}",
            config=to_dict(run.experiment),
            resume="allow",
            **settings[self.name],
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log what no earlier session has logged."""
        if numbers := self.info.new_numbers(step, values):
            self.run.log(numbers, step=step)

    def close(self) -> None:
        """Returns when everything is stored."""
        self.run.finish()


def trackio() -> WandB:
    """The logger for `trackio show`."""
    return WandB("trackio")
