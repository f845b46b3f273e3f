"""Notices a step that does not end, and names the rank that the others wait for.

docs/parallel.md says which one that is. Then every process exits, so that torchrun can restart the
group.
"""

# pyright: reportPrivateImportUsage=false
# (Stores are in torch's documentation, but not in its lists of exports.)
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_stack
from types import FrameType
from typing import Any, NamedTuple

import torch.distributed as dist

from switchworks.parallel import torchrun

_DEPTH = 6
"""Innermost frames in which a call of torch.distributed counts as waiting."""
_MAX_NAMED = 8
"""Ranks of a kind that a message names."""


class RankStatus(NamedTuple):
    """The last report of a rank."""

    beat: int
    """Number of the report."""
    step: int
    """Steps done."""
    where: str
    """The current frame of its main thread."""
    waits: bool
    """Whether it waits there for other ranks."""


class Watchdog:
    """Reports for one rank and watches all of them. Call `reached` after every step."""

    def __init__(
        self,
        store: "dist.Store",
        rank: int,
        world: int,
        timeout: float,
        *,
        step: int = 0,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        """Watch the calling thread until `close`; `timeout` is in seconds. `leave` ends the
        process, which may be stuck in a collective that no exception reaches."""
        self.store, self.rank, self.world, self.timeout = store, rank, world, timeout
        self.step = step
        self.leave = leave
        self.interval = min(10.0, timeout / 20)
        """Seconds between two reports."""
        self._step_started = time.monotonic()
        self._beat = 0
        self._watched = threading.get_ident()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def reached(self, step: int) -> None:
        """Note that `step` steps are done."""
        self.step, self._step_started = step, time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._report()
            while not self._closed.wait(self.interval):
                self._report()
                if time.monotonic() - self._step_started > self.timeout:
                    self._give_up()
                    return
        except RuntimeError:
            return  # torchrun and its store are gone: nobody is left who could restart the group

    def _report(self) -> None:
        self._beat += 1
        where, waits = current_frame(sys._current_frames().get(self._watched))
        self.store.set(f"rank {self.rank}", json.dumps([self._beat, self.step, where, waits]))

    def _give_up(self) -> None:
        before = self._statuses()
        # Every rank that is alive reports at least twice in this time, so one whose beat stays the
        # same is stopped or gone.
        if self._closed.wait(2.5 * self.interval):
            return
        self._report()
        message = diagnose(before, self._statuses(), self.timeout)
        if self.store.add("said", 1) == 1:
            print(f"error: {message}", file=sys.stderr, flush=True)
        self.leave(1)

    def _statuses(self) -> list[RankStatus | None]:
        keys = [f"rank {rank}" for rank in range(self.world)]
        return [
            RankStatus(*json.loads(self.store.get(key))) if self.store.check([key]) else None
            for key in keys
        ]


def diagnose(
    before: list[RankStatus | None], after: list[RankStatus | None], timeout: float
) -> str:
    """Which rank hangs in which step, from the reports of all ranks at two times; None: no report.

    A silent rank explains why the others wait, and also why some may still be busy: then only the
    silent ones are blamed. If all ranks report, those that do not wait are. The step named is the
    one that the blamed ranks are in: ranks that wait may be one step ahead.
    """
    pairs = enumerate(zip(before, after, strict=True))
    silent = [rank for rank, (a, b) in pairs if b is None or (a is not None and a.beat == b.beat)]
    alive = {rank: status for rank, status in enumerate(after) if status and rank not in silent}
    busy = {} if silent else {rank: status for rank, status in alive.items() if not status.waits}
    waiting = {rank: status for rank, status in alive.items() if status.waits}
    steps = [status.step for status in (busy or waiting or alive).values()]
    step = (min(steps) if busy else max(steps, default=0)) + 1
    lines = [f"step {step} has not ended for {timeout:g} seconds."]
    for rank in silent[:_MAX_NAMED]:
        status = after[rank]
        last = f"; last heard of in step {status.step + 1}, at {status.where}" if status else ""
        lines.append(f"rank {rank} does not answer: stopped, or its machine is gone{last}")
    for rank, status in list(busy.items())[:_MAX_NAMED]:
        lines.append(f"rank {rank} hangs in step {status.step + 1}, at {status.where}")
    if waiting:
        names = ", ".join(map(str, list(waiting)[:_MAX_NAMED]))
        more = ", ..." if len(waiting) > _MAX_NAMED else ""
        first = next(iter(waiting.values()))
        lines.append(
            f"waiting for others: rank {names}{more}, in step {first.step + 1}, at {first.where}"
        )
    return "\n  ".join(lines)


def current_frame(frame: FrameType | None) -> tuple[str, bool]:
    """Where the thread with this innermost frame is, and whether it waits there for other ranks.

    A backward pass counts as waiting: it runs in C++, so a collective in it shows no frame, while
    what it computes by itself comes to an end.
    """
    if frame is None:
        return "its end", False
    frames = [frame for frame, _ in walk_stack(frame)]
    inner = _location(frames[0])
    package = (f for f in frames if "switchworks" in Path(f.f_code.co_filename).parts)
    caller = next(map(_location, package), inner)
    distributed = os.path.join("torch", "distributed", "")
    waits = any(distributed in f.f_code.co_filename for f in frames[:_DEPTH])
    waits = waits or frames[0].f_code.co_name == "_engine_run_backward"
    return inner if caller == inner else f"{inner}, called from {caller}", waits


def _location(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"


@contextmanager
def watching(step: int, timeout: float) -> "Iterator[Callable[[int], None]]":
    """Inside, a `Watchdog` watches ranks that torchrun started; yields its `reached`.

    `step` steps are done already. A `timeout` of 0 watches nothing.
    """
    store = torchrun.agent_store() if torchrun.world() > 1 and timeout else None
    if store is None:
        yield lambda step: None
        return
    reports = dist.PrefixStore(f"watch of attempt {torchrun.attempt()}", store)
    watchdog = Watchdog(reports, torchrun.rank(), torchrun.world(), timeout, step=step)
    try:
        yield watchdog.reached
    finally:
        watchdog.close()
