"""A step that does not end: noticed, and the rank named that the others wait for.

A thread of each rank tells the others, through torchrun's store, which step its rank has done and
where in the code it is. When a step takes longer than is allowed, whoever is not waiting for others
in torch.distributed, or tells nothing any more, is to blame. Then the process leaves, so that
torchrun can restart the group.
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
from types import FrameType
from typing import Any, NamedTuple

import torch.distributed as dist

from switchworks.parallel import torchrun as launch

_DEEP = 6
"""Innermost frames among which a wait in torch.distributed is looked for."""


class RankStatus(NamedTuple):
    """What a rank last told of itself."""

    beat: int
    """How often it has told."""
    step: int
    """Steps done."""
    where: str
    """What its main thread does."""
    waits: bool
    """Whether that is to wait for others."""


class Watchdog:
    """One rank's eye on all of them. `reached` is to be called after every step."""

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
        """Watches the thread that makes it, from now on until `close`."""
        self.store, self.rank, self.world, self.timeout = store, rank, world, timeout
        self.step = step
        self.leave = leave
        self.pause = min(10.0, timeout / 20)
        self._since = time.monotonic()
        self._beat = 0
        self._watched = threading.get_ident()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def reached(self, step: int) -> None:
        """The rank has done `step` steps."""
        self.step, self._since = step, time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._tell()
            while not self._closed.wait(self.pause):
                self._tell()
                if time.monotonic() - self._since > self.timeout:
                    self._give_up()
                    return
        except RuntimeError:
            return  # torchrun and its store are gone, and with them whoever could restart

    def _tell(self) -> None:
        self._beat += 1
        where, waits = current_frame(sys._current_frames().get(self._watched))
        self.store.set(f"rank {self.rank}", json.dumps([self._beat, self.step, where, waits]))

    def _give_up(self) -> None:
        before = self._look()
        if self._closed.wait(2.5 * self.pause):  # time for those who live to tell something new
            return
        self._tell()
        message = diagnose(before, self._look(), self.timeout)
        if self.store.add("said", 1) == 1:
            print(f"error: {message}", file=sys.stderr, flush=True)
        self.leave(1)

    def _look(self) -> list[RankStatus | None]:
        keys = [f"rank {rank}" for rank in range(self.world)]
        return [
            RankStatus(*json.loads(self.store.get(key))) if self.store.check([key]) else None
            for key in keys
        ]


def diagnose(
    before: list[RankStatus | None], after: list[RankStatus | None], timeout: float
) -> str:
    """Who hangs at which step, from what ranks told at two times. At most eight are named."""
    silent = [rank for rank, pair in enumerate(zip(before, after, strict=True)) if _same(*pair)]
    awake = {rank: sight for rank, sight in enumerate(after) if sight and rank not in silent}
    busy = {} if silent else {rank: sight for rank, sight in awake.items() if not sight.waits}
    waiting = {rank: sight for rank, sight in awake.items() if sight.waits}
    steps = [sight.step for sight in (busy or waiting or awake).values()]
    step = (min(steps) if busy else max(steps, default=0)) + 1
    lines = [f"step {step} has not ended for {timeout:g} seconds."]
    for rank in silent[:8]:
        sight = after[rank]
        last = f"; last heard of in step {sight.step + 1}, at {sight.where}" if sight else ""
        lines.append(f"rank {rank} does not answer: stopped, or its machine is gone{last}")
    for rank, sight in list(busy.items())[:8]:
        lines.append(f"rank {rank} hangs in step {sight.step + 1}, at {sight.where}")
    if waiting:
        names = ", ".join(map(str, list(waiting)[:8])) + (", ..." if len(waiting) > 8 else "")
        first = next(iter(waiting.values()))
        lines.append(
            f"waiting for others: rank {names}, in step {first.step + 1}, at {first.where}"
        )
    return "\n  ".join(lines)


def _same(before: RankStatus | None, after: RankStatus | None) -> bool:
    return after is None or (before is not None and before.beat == after.beat)


def current_frame(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread is, and whether it waits there for other ranks. A backward pass that is in no
    Python code does: what it computes by itself ends."""
    inner: list[FrameType] = []
    ours = ""
    while frame is not None:
        inner.append(frame)
        if not ours and "switchworks" in Path(frame.f_code.co_filename).parts:
            ours = _place(frame)
        frame = frame.f_back
    if not inner:
        return "its end", False
    here = _place(inner[0])
    parallel = os.path.join("torch", "distributed", "")
    waits = any(parallel in at.f_code.co_filename for at in inner[:_DEEP])
    waits = waits or inner[0].f_code.co_name == "_engine_run_backward"
    return here if ours in ("", here) else f"{here}, called from {ours}", waits


def _place(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"


@contextmanager
def watching(step: int, timeout: float) -> "Iterator[Callable[[int], None]]":
    """Inside, ranks that torchrun started are watched. Yields what to call with each step done."""
    store = launch.connect() if launch.world() > 1 and timeout else None
    if store is None:
        yield lambda step: None
        return
    own = dist.PrefixStore(f"watch of attempt {launch.attempt()}", store)
    watch = Watchdog(own, launch.rank(), launch.world(), timeout, step=step)
    try:
        yield watch.reached
    finally:
        watch.close()
