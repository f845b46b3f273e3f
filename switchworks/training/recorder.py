"""Sends the metrics of a run to its loggers, and keeps those of the current step for hooks."""

from collections.abc import Mapping, Sequence
from typing import Any

from switchworks.training.loggers.logger import Logger, RunInfo
from switchworks.training.state import TrainState


class Recorder:
    """Forwards metrics to `loggers`; on ranks other than the main one there are none."""

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self.loggers = loggers
        self.names: set[str] = set()
        """All metrics of this session."""
        self._step = -1
        self._values: dict[str, Any] = {}

    def start(self, run: RunInfo) -> None:
        """Start every logger."""
        for logger in self.loggers:
            logger.start(run)

    def write(self, state: TrainState, values: Mapping[str, Any]) -> None:
        """Log `values` for the current step, with the tokens and seconds so far."""
        self.names |= values.keys()
        self._values = self.at(state.step) | dict(values)
        self._step = state.step
        counters = {"tokens": state.tokens, "seconds": round(state.seconds, 3)}
        for logger in self.loggers:
            logger.log(state.step, counters | dict(values))

    def at(self, step: int) -> dict[str, Any]:
        """All metrics of `step`, if it is the last step of which any were written."""
        return dict(self._values) if self._step == step else {}

    def close(self) -> None:
        """Close every logger."""
        for logger in self.loggers:
            logger.close()
