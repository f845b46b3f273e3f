"""Updates during the backward pass, so that the gradients of all weights never exist together.

Once the backward pass has accumulated the whole gradient of a weight it does not read that weight
again, so the weight can be updated at once and its gradient freed. Only a sum over micro-batches or
ranks, or clipping by the norm of all gradients, needs them side by side.
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
"""Elements from which a weight is updated during the pass. Smaller ones are updated together after
it, since calling an optimizer for each would cost more than its arithmetic."""
BUCKET = 2**24
"""Elements of large gradients that are updated together: 64 MB in float32."""


class BackwardUpdater(Updater):
    """An `Updater` that updates large weights in the backward pass, to the same values bit for bit.

    Call `begin()`, one backward pass, and `step()`, which updates the rest. From the first gradient
    that is not finite nothing is updated, and `step()` reports it in the norm; earlier updates of
    the same step stay.
    """

    def __init__(
        self, masters: MasterWeights, optimizers: list[torch.optim.Optimizer], config: OptimConfig
    ) -> None:
        super().__init__(masters, optimizers, config)
        assert config.clip_norm is None, "clipping needs the norm of all gradients"
        self._in_step = False
        self._bucket: list[str] = []
        """Names of large weights with a gradient, not yet updated."""
        self._small: dict[str, Tensor | None] = {}
        self._norms: list[float] = []
        # The hooks hold a weak reference: the model would otherwise keep its updater, and the
        # updater its model, alive until the garbage collector runs.
        updater: weakref.ref[BackwardUpdater] = weakref.ref(self)
        for name, parameter in masters.parameters().items():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(_on_grad, updater, name))

    def begin(self, step: int, total_steps: int) -> None:
        """The next backward pass is that of step number `step` (from 0) of `total_steps`."""
        self._set_rate(learning_rate(self.config, step, total_steps))
        self._bucket, self._small, self._norms = [], {}, []
        self._in_step = True

    def step(self, step: int, total_steps: int) -> UpdateStats:
        """Update the weights that are left; the norm is that of all gradients of the step."""
        assert self._in_step, "begin() comes before the backward pass"
        self._in_step = False
        parameters = self.masters.parameters()
        for name, grad in self._small.items():
            parameters[name].grad = grad
        self._small = {}
        self.update(list(self.gradients()))
        lr = learning_rate(self.config, step, total_steps)
        return UpdateStats(lr, math.hypot(*self._norms))

    def update(self, names: list[str]) -> None:
        """Update `names`, all weights that have a gradient now, if all norms so far are finite."""
        gradients = self.gradients()
        self._norms.append(float(global_norm([gradients[name] for name in names])))
        if math.isfinite(sum(self._norms)):
            self._update(names, scale=1.0)

    def on_grad(self, name: str, parameter: nn.Parameter) -> None:
        """Called by autograd when the gradient of `parameter` is complete."""
        if not self._in_step:  # a backward pass outside of a training step
            return
        if parameter.numel() < LARGE:
            # Hidden from the optimizer, which updates every parameter that has a gradient.
            self._small[name], parameter.grad = parameter.grad, None
            return
        self._bucket.append(name)
        parameters = self.masters.parameters()
        if sum(parameters[other].numel() for other in self._bucket) >= BUCKET:
            names, self._bucket = self._bucket, []
            self.update(names)


def _on_grad(reference: "weakref.ref[BackwardUpdater]", name: str, parameter: nn.Parameter) -> None:
    if (updater := reference()) is not None:
        updater.on_grad(name, parameter)
