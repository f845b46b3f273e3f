"""A hook that acts every so many steps."""

from collections.abc import Callable

from switchworks.training.state import TrainState
from switchworks.training.step import StepResult


class Every:
    """Calls `action` every `steps` steps, and after the last step unless a signal ended the run."""

    def __init__(self, steps: int, action: Callable[[TrainState], None]) -> None:
        """`steps` is 1 or more."""
        self.steps = steps
        self.action = action
        self._done = -1

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Act when it is time."""
        if state.step % self.steps == 0:
            self._act(state)

    def finish(self, state: TrainState, *, interrupted: bool) -> None:
        """Act on the last step, unless that has been done."""
        if not interrupted and self._done != state.step:
            self._act(state)

    def _act(self, state: TrainState) -> None:
        self._done = state.step
        self.action(state)
