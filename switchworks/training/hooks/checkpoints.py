"""Checkpoints while training, and the heartbeat of the watchdog."""

from collections.abc import Callable

from switchworks.checkpoint import Checkpoints
from switchworks.training.state import TrainState
from switchworks.training.step import StepResult


class SaveCheckpoints:
    """Saves all training state every `every` steps (0: never), and always when the loop ends."""

    def __init__(self, checkpoints: Checkpoints, every: int) -> None:
        self.checkpoints = checkpoints
        self.every = every
        self._done = -1

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Save when it is time."""
        if self.every and state.step % self.every == 0:
            self._save(state)

    def finish(self, state: TrainState, *, interrupted: bool) -> None:
        """Save the last step and return when it is on the disk."""
        if self._done != state.step:
            self._save(state)
        self.checkpoints.wait()

    def _save(self, state: TrainState) -> None:
        self._done = state.step
        self.checkpoints.save(state.step, state.state_dict(), state.about())


class ReportProgress:
    """Reports each finished step, hooks included, to the watchdog: last in the list of hooks."""

    def __init__(self, reached: Callable[[int], None]) -> None:
        self.reached = reached

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Report the step."""
        self.reached(state.step)

    def finish(self, state: TrainState, *, interrupted: bool) -> None:
        """Report the end."""
        self.reached(state.step)
