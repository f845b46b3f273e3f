"""The training loop: a step, then every hook. Everything optional is a hook."""

import errno
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import islice
from types import FrameType
from typing import Any, Protocol, TextIO, cast, runtime_checkable

from switchworks.batch import Batch
from switchworks.parallel import Ranks, torchrun
from switchworks.training.state import TrainState
from switchworks.training.step import StepResult, train_step

log = logging.getLogger(__name__)


@runtime_checkable
class Hook(Protocol):
    """Something that happens beside training, on every rank, in the order of the list of hooks."""

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Called after every step; `state.step` counts it already."""

    def finish(self, state: TrainState, *, interrupted: bool) -> None:
        """Called once, after the last step or after the one in which a signal came."""


class LostContactError(RuntimeError):
    """Another rank has died. Names the step."""


_STOPS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


class Interrupt:
    """Ctrl-C, SIGTERM, a closed terminal, or a reader of the output that has gone: the loop stops
    after the current step."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The signal this process received."""
        self.agreed: signal.Signals | None = None
        """The signal any rank received, known to all. Acting on `signal` alone would deadlock."""

    def agree(self, ranks: Ranks) -> None:
        """Collective: set `agreed` on all `ranks` if one of them received a signal."""
        number = ranks.all_max(0 if self.signal is None else self.signal.value)
        if number:
            self.agreed = signal.Signals(number)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the first signal requests a stop. A second SIGINT acts as usual; a second SIGTERM
        does nothing, since torchrun repeats the one its workers have received. Only the main thread
        may listen; training in another one hears nothing. SIGHUP that nohup ignores stays so."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {name: signal.getsignal(name) for name in _STOPS}
        if previous[signal.SIGHUP] is signal.SIG_IGN:
            del previous[signal.SIGHUP]

        def request(number: int, _frame: FrameType | None) -> None:
            self.signal = signal.Signals(number)
            print(f"\n{self.signal.name}: saving after this step ...", flush=True)
            signal.signal(signal.SIGINT, previous[signal.SIGINT])
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

        def reader_gone() -> None:
            self.signal = self.signal or signal.SIGPIPE

        for name in previous:
            signal.signal(name, request)
        try:
            with redirect_stdout(cast("TextIO", _Outlet(sys.stdout, reader_gone))):
                yield
        finally:
            for name, handler in previous.items():
                signal.signal(name, handler)


class _Outlet:
    """The text stream `stream`. Once its reader is gone, a pipe or a terminal that was closed, what
    is written to it is lost and `gone` is called, once."""

    def __init__(self, stream: TextIO, gone: Callable[[], None]) -> None:
        self._stream, self._gone = stream, gone

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            # All that shares the descriptor writes to nowhere from now on, so this is met once.
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
            self._gone()


def run_loop(
    state: TrainState, batches: Iterator[Batch], hooks: Sequence[Hook], interrupt: Interrupt
) -> None:
    """Train `state` to its last step, or until it ends early or `interrupt` is set. Raises
    LostContactError if a rank of the mesh dies."""
    try:
        _loop(state, batches, hooks, interrupt)
    except RuntimeError as error:
        if state.ranks.mesh is None or not torchrun.is_lost_contact(error):
            raise
        raise LostContactError(
            f"A rank was lost in step {state.step + 1}: killed, or failed with an error of its own."
            "\n  With torchrun --max-restarts N all go on from the last checkpoint."
        ) from error


PATIENCE = 60.0
"""Seconds without a batch after which a run says that it waits for one."""


def _waited_for(batches: Iterator[Batch], state: TrainState) -> Iterator[Batch]:
    """The same batches. Each time that one takes longer than PATIENCE, a thread says so."""
    since, closed = [math.inf], threading.Event()

    def watch() -> None:
        while not closed.wait(PATIENCE / 4):
            if time.monotonic() - since[0] > PATIENCE:
                log.warning(
                    "step %d waits for its batch since %.0f seconds.\n  Its text is read from the "
                    "cache (--data.cache): is that disk there? --data.prefetch 0 reads it in the "
                    "main thread, where Ctrl-C shows at what it stands.",
                    *(state.step + 1, time.monotonic() - since[0]),
                )
                since[0] = math.inf  # once a batch

    threading.Thread(target=watch, daemon=True, name="waits for batches").start()
    try:
        while True:
            since[0] = time.monotonic()
            batch = next(batches)
            since[0] = math.inf
            yield batch
    finally:
        closed.set()


def _loop(
    state: TrainState, batches: Iterator[Batch], hooks: Sequence[Hook], interrupt: Interrupt
) -> None:
    started = time.perf_counter()
    steps = 0 if state.ended else max(0, state.experiment.num_steps - state.step)
    for batch in islice(_waited_for(batches, state), steps):
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
    interrupt.agree(state.ranks)  # a signal may have come while the hooks finished
