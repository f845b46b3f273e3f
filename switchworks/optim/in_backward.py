"""Weights that move while the backward pass goes on, so that gradients are not held side by side.

Once a backward pass has the whole gradient of a weight it does not look at that weight again. So
the weight may move at once and its gradient may go: a few gradients are there in place of a
model's worth of them. Only a bound on the norm of all, or a sum over micro-batches or ranks, has
to have them side by side.
"""

import math
import weakref
from functools import partial

import torch
from torch import Tensor, nn

from switchworks.optim.build import Updater, UpdateStats
from switchworks.optim.clip import global_norm
from switchworks.optim.config import OptimConfig
from switchworks.optim.masters import MasterWeights
from switchworks.optim.schedule import learning_rate

LARGE = 2**16
"""Numbers from which a weight moves early. Small ones move together after the backward pass, since
calling an optimizer for each would cost more than its arithmetic."""
TOGETHER = 2**24
"""Numbers in large gradients that wait for each other: 64 MB in float32."""


class BackwardUpdater(Updater):
    """An `Updater` whose large weights move in the backward pass, to the same values bit for bit.

    Call `begin()`, one backward pass, and `step()`, which moves the rest. Where a gradient is not
    finite nothing moves from there on, and `step()` tells; what moved before has moved.
    """

    def __init__(
        self, masters: MasterWeights, optimizer: torch.optim.Optimizer, config: OptimConfig
    ) -> None:
        super().__init__(masters, optimizer, config)
        assert config.clip_norm is None, "a bound needs the norm of all gradients"
        self._inside = False
        self._waiting: list[str] = []
        self._set_aside: dict[str, Tensor | None] = {}
        self._norms: list[float] = []
        me: weakref.ref[BackwardUpdater] = weakref.ref(self)  # not self: that would be a cycle
        for name, parameter in masters.parameters().items():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(_arrived, me, name))

    def begin(self, step: int, total_steps: int) -> None:
        """The backward pass that comes is that of step number `step` (from 0) of `total_steps`."""
        self._set_rate(learning_rate(self.config, step, total_steps))
        self._waiting, self._set_aside, self._norms = [], {}, []
        self._inside = True

    def step(self, step: int, total_steps: int) -> UpdateStats:
        """Move what has not moved yet; the norm is that of all gradients of the step."""
        assert self._inside, "begin() comes before the backward pass"
        self._inside = False
        parameters = self.masters.parameters()
        for name, grad in self._set_aside.items():
            parameters[name].grad = grad
        self._set_aside = {}
        self.move(list(self.gradients()))
        lr = learning_rate(self.config, step, total_steps)
        return UpdateStats(lr, math.hypot(*self._norms))

    def move(self, names: list[str]) -> None:
        """Move the weights `names`, of all that have gradients, unless a gradient of this step was
        not finite."""
        gradients = self.gradients()
        self._norms.append(float(global_norm([gradients[name] for name in names])))
        if math.isfinite(sum(self._norms)):
            self._move(names, scale=1.0)

    def arrived(self, name: str, parameter: nn.Parameter) -> None:
        """The gradient of `parameter` is whole."""
        if not self._inside:  # another backward pass than that of a step
            return
        if parameter.numel() < LARGE:
            self._set_aside[name], parameter.grad = parameter.grad, None
            return
        self._waiting.append(name)
        parameters = self.masters.parameters()
        if sum(parameters[other].numel() for other in self._waiting) >= TOGETHER:
            names, self._waiting = self._waiting, []
            self.move(names)


def _arrived(updater: "weakref.ref[BackwardUpdater]", name: str, parameter: nn.Parameter) -> None:
    if (found := updater()) is not None:
        found.arrived(name, parameter)
