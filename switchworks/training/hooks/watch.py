"""Warnings of a run, each once: dead experts, routers that collapse, scarce memory."""

import logging
from collections.abc import Callable, Sequence

from switchworks.model import RoutingConfig
from switchworks.training import machine
from switchworks.training.state import TrainState
from switchworks.training.step import StepResult

log = logging.getLogger(__name__)

DECAY = 0.99
"""Of the running mean of an expert's share of what tokens ask for, step by step."""
DEAD = 0.05
"""Times the fair share below which an expert counts as dead: after 300 steps without a token."""
COLLAPSED = 0.5
"""The share of one expert from which the router counts as collapsed."""
SCARCE = 2**28
"""Bytes of memory that should be left."""


class WatchRouters:
    """Warns once of each layer whose experts are dead, or whose tokens nearly all ask for one.

    Shazeer et al. 2017, section 4: favoured experts are trained more, and so are chosen more.
    """

    def __init__(self, routing: RoutingConfig) -> None:
        self.routing = routing
        self._load: dict[str, list[float]] = {}
        self._warned: set[tuple[str, str]] = set()

    def after_step(self, state: TrainState, result: StepResult) -> None:
        fair = 1 / self.routing.experts
        for name, layer in result.layers.items():
            before = self._load.get(name, [fair] * self.routing.experts)
            load = [DECAY * x + (1 - DECAY) * y for x, y in zip(before, layer.load, strict=True)]
            self._load[name] = load
            dead = [str(number) for number, share in enumerate(load) if share < DEAD * fair]
            if dead:
                self._warn(name, f"hardly a token asks for {_some(dead)} of {len(load)} experts")
            if max(load) > max(COLLAPSED, 2 * fair):
                favourite = load.index(max(load))
                self._warn(name, f"{max(load):.0%} of the tokens ask for expert {favourite}")

    def finish(self, state: TrainState, *, interrupted: bool) -> None:
        """Nothing is left to do."""

    def _warn(self, layer: str, finding: str) -> None:
        kind = (layer, finding.split()[0])
        if kind in self._warned:
            return
        self._warned.add(kind)
        log.warning(
            "%s: %s.\n  Raise --routing.balance-weight (%g), set --routing.bias-rate 1e-3, or "
            "lower --optim.router-lr.",
            *(layer, finding, self.routing.balance_weight),
        )


def _some(names: Sequence[str], most: int = 6) -> str:
    """At most so many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class WatchMemory:
    """Warns once if the memory of the machine, or what its container may have, is nearly used up:
    a process that takes more is killed without a word."""

    def __init__(self, free: Callable[[], int | None] = machine.available_memory) -> None:
        self.free = free
        self._warned = False

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if self._warned or state.step % 10 != 1:
            return
        free = self.free()
        if free is not None and free < SCARCE:
            self._warned = True
            log.warning(
                "step %d: %d MB of memory are left, and without any this process is killed.\n"
                "  Raise --micro-batches, or set --activation-checkpointing or "
                "--update-in-backward; the last checkpoint is whole.",
                *(state.step, free // 2**20),
            )

    def finish(self, state: TrainState, *, interrupted: bool) -> None:
        """Nothing is left to do."""
