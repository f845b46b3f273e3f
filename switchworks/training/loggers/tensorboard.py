"""TensorBoard event files in tensorboard/ of the run directory."""

import logging
from collections.abc import Mapping
from typing import Any

from switchworks.training.loggers.logger import RunInfo


class TensorBoard:
    """Writes every number as a scalar."""

    def start(self, run: RunInfo) -> None:
        """TensorBoard hides what an earlier session logged after the step it is resumed from."""
        from torch.utils.tensorboard import SummaryWriter

        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        self.writer = SummaryWriter(str(run.directory / "tensorboard"), purge_step=run.step + 1)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a scalar for each number."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self.writer.close()
