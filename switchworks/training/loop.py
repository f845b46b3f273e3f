"""The training loop. Everything optional is a hook."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from types import FrameType
from typing import Protocol, runtime_checkable

from switchworks.batch import Batch
from switchworks.parallel import Ranks
from switchworks.parallel import torchrun as launch
from switchworks.training.state import TrainState
from switchworks.training.step import StepResult, train_step


@runtime_checkable
class Hook(Protocol):
    """Something that happens beside training."""

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Called after every step."""
        ...

    def finish(self, state: TrainState, *, interrupted: bool) -> None:
        """Called once, after the last step or when a signal asked to leave."""
        ...


class LostContactError(RuntimeError):
    """Another rank is gone. Names the step."""


class Interrupt:
    """Set by SIGINT or SIGTERM; the loop leaves after the step it is in."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """What this process got."""
        self.agreed: signal.Signals | None = None
        """What all ranks know that one of them got: only on this may they act."""

    def agree(self, ranks: Ranks) -> None:
        """Afterwards all `ranks` know of a signal that one of them got. They call it together."""
        number = ranks.all_max(0 if self.signal is None else self.signal.value)
        if number:
            self.agreed = signal.Signals(number)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While inside, the first signal asks to leave. A second SIGINT then acts as it always
        does; a second SIGTERM does nothing, as torchrun passes on what its workers got already."""
        previous = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, _frame: FrameType | None) -> None:
            self.signal = signal.Signals(number)
            print(f"\n{self.signal.name}: saving after this step ...", flush=True)
            signal.signal(signal.SIGINT, previous[signal.SIGINT])
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

        for name in previous:
            signal.signal(name, ask)
        try:
            yield
        finally:
            for name, handler in previous.items():
                signal.signal(name, handler)


def run(
    state: TrainState, batches: Iterator[Batch], hooks: Sequence[Hook], interrupt: Interrupt
) -> None:
    """Train `state` until its experiment's last step, or until it has ended before or `interrupt`
    is set. Raises LostContactError if a rank of the mesh is lost."""
    try:
        _run(state, batches, hooks, interrupt)
    except RuntimeError as error:
        if state.ranks.mesh is None or not launch.is_lost_contact(error):
            raise
        raise LostContactError(
            f"A rank was lost in step {state.step + 1}: killed, or failed with an error of its own."
            "\n  With torchrun --max-restarts N all go on from the last checkpoint."
        ) from error


def _run(
    state: TrainState, batches: Iterator[Batch], hooks: Sequence[Hook], interrupt: Interrupt
) -> None:
    started = time.perf_counter()
    steps = 0 if state.ended else max(0, state.experiment.steps - state.step)
    for batch in islice(batches, steps):
        result = train_step(state, batch)
        state.seconds += time.perf_counter() - started
        for hook in hooks:
            hook.after_step(state, result)
        interrupt.agree(state.ranks)
        if interrupt.agreed is not None or state.ended:
            break
        started = time.perf_counter()  # what hooks took is not training time
    for hook in hooks:
        hook.finish(state, interrupted=interrupt.agreed is not None)
    interrupt.agree(state.ranks)  # on what came in the meantime
