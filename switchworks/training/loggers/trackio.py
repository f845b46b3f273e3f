"""Trackio: a local dashboard (`trackio show`), or where its own environment variables say."""

import os
from collections.abc import Mapping
from typing import Any

from switchworks.config import to_dict
from switchworks.training.loggers.logger import RunInfo, require_package


class Trackio:
    """Logs to the project that TRACKIO_PROJECT names, else "switchworks"."""

    def __init__(self) -> None:
        """Raises ConfigError if trackio is not installed."""
        self.trackio = require_package("trackio")

    def start(self, run: RunInfo) -> None:
        """A resumed run goes on under its name."""
        self.info = run
        name = f"{run.experiment.name}-{run.info['id']}"
        self.run = self.trackio.init(
            os.environ.get("TRACKIO_PROJECT", "switchworks"),
            name=name,
            config=to_dict(run.experiment),
            resume="allow",
            embed=False,
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log what no earlier session has."""
        if numbers := self.info.new_numbers(step, values):
            self.run.log(numbers, step=step)

    def close(self) -> None:
        """Returns when everything is stored."""
        self.run.finish()
