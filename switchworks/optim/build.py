"""From a model's parameters and an OptimConfig to one object that takes steps.

`build_optimizer` groups the parameters (`groups.py`) and gives them to the optimizer of that name.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchworks.config import CheckpointError, ConfigError, flatten
from switchworks.optim.clip import clip_coefficient, first_nonfinite, global_norm
from switchworks.optim.config import OptimConfig, optimizer_builder
from switchworks.optim.groups import group_parameters
from switchworks.optim.masters import MasterWeights
from switchworks.optim.schedule import learning_rate

State = dict[str, dict[str, Any]]


class UpdateStats(NamedTuple):
    """What one step did."""

    lr: float
    """The scheduled learning rate; a group's rate is a factor on it."""
    grad_norm: float
    """Norm of all gradients together, before clipping. If not finite, nothing was updated."""


class Updater:
    """Masters, optimizers, clipping and schedule as one: gradients in, updated weights out.

    Call `accumulate()` after each micro-batch's backward pass and `step()` after the last. With a
    single micro-batch call `step()` alone: it casts 16-bit gradients to float32 bucket by bucket,
    so that a float32 copy of all of them never exists.
    """

    def __init__(
        self, masters: MasterWeights, optimizers: list[torch.optim.Optimizer], config: OptimConfig
    ) -> None:
        self.masters = masters
        self.optimizers = optimizers
        self.config = config

    def begin(self, step: int, total_steps: int) -> None:
        """Call before the first backward pass of step number `step`. Does nothing here."""

    def accumulate(self) -> None:
        """Add the parameters' gradients to the accumulated ones, in float32."""
        self.masters.accumulate()

    def step(self, step: int, total_steps: int) -> UpdateStats:
        """Take step number `step` (from 0) of `total_steps` with the accumulated gradients.

        Afterwards the model holds the new weights and the gradients are gone. If their norm is
        not finite, weights, state and gradients stay as they are, for the caller to inspect. A
        parameter without a gradient keeps its value and its state.
        """
        if self.masters.accumulating:
            self.accumulate()
        lr = learning_rate(self.config, step, total_steps)
        norm = float(global_norm(list(self.masters.gradients().values())))
        if math.isfinite(norm):
            self._set_rate(lr)
            for names in self.masters.buckets():
                self._update(names, clip_coefficient(norm, self.config.clip_norm))
        return UpdateStats(lr, norm)

    def gradients(self) -> dict[str, Tensor]:
        """Name -> accumulated gradient. The tensors are not copies."""
        return self.masters.gradients()

    def zero(self, names: Iterable[str] | None = None) -> None:
        """Drop the gradients of `names`, or all."""
        self.masters.zero(names)

    def first_nonfinite_gradient(self) -> str | None:
        """The first parameter, in the model's order, whose gradient is not finite, or None."""
        self.accumulate()
        return first_nonfinite(self.masters.gradients().items())

    def float_state(self) -> dict[str, Tensor]:
        """Name -> weight in full precision, for export. The tensors are not copies."""
        return self.masters.float_state()

    def _set_rate(self, lr: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["rate"]

    def _update(self, names: list[str], scale: float) -> None:
        """Update `names` by their gradients times `scale`. No other master may have a gradient."""
        self.masters.prepare_grads(names, scale)
        for optimizer in self.optimizers:
            optimizer.step()
        self.masters.copy_to_model(names)
        self.zero(names)

    def state_dict(self) -> State:
        """{"weights": {name: tensor}, "optimizer": {name: {slot: tensor}}}, complete from step 0.

        A frozen parameter is among the weights and has no slots. The tensors are not copies. The
        learning rate is not included: it follows from the step.
        """
        state: dict[Tensor, dict[str, Any]] = {}
        for optimizer in self.optimizers:
            state |= optimizer.state
        slots = {
            name: dict(state.get(master, {}))
            for name, master in self.masters.named().items()
            if master.requires_grad
        }
        return {"weights": self.float_state(), "optimizer": slots}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Copy `state` in; training then continues bit for bit.

        Call it also after the tensors of `state_dict()` were filled in place, so that a 16-bit
        model follows its masters. Raises CheckpointError, with nothing changed, if a name or a
        shape does not fit.
        """
        current, stored = flatten(self.state_dict()), flatten(state)
        _check_fit(current, stored)
        for name, tensor in current.items():
            tensor.copy_(stored[name])
        self.masters.copy_to_model()


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    letters: Mapping[str, str],
    config: OptimConfig,
    weights: Mapping[str, Tensor] | None = None,
) -> Updater:
    """An Updater for the parameters, with the optimizer, schedule and clipping of `config`.

    `letters` maps a parameter's name to its dimension letters ("E D F", see `dimension_letters`
    and `groups.py`). A frozen parameter goes to no optimizer and has no state, only its weight.
    `weights`: float32 values the masters start from, see `MasterWeights`.

    A function listed in `OPTIMIZERS` gets groups of masters, each `settings()` of which is a
    parameter group for torch, and returns one torch optimizer or several that together have every
    parameter. All of an optimizer's state consists of tensors and exists from the start; `step()`
    reads the group's "lr" and passes over parameters without a gradient. On a mesh parameters are
    DTensors. Raises ConfigError if a parameter is in no optimizer or in two.
    """
    masters = MasterWeights(named_parameters, weights)
    groups = group_parameters(masters.named(), letters, config)
    optimizers = optimizer_builder(config.name)(groups, config)
    _check_complete(masters, optimizers, config.name)
    return Updater(masters, optimizers, config)


def _check_complete(
    masters: MasterWeights, optimizers: list[torch.optim.Optimizer], name: str
) -> None:
    groups = chain.from_iterable(optimizer.param_groups for optimizer in optimizers)
    held = Counter(parameter for group in groups for parameter in group["params"])
    for parameter_name, master in masters.named().items():
        if held[master] != int(master.requires_grad):
            raise ConfigError(
                f"optim.name = {name}: {parameter_name} is in {held[master]} parameter groups and "
                f"should be in {int(master.requires_grad)}.\n"
                "  The function in OPTIMIZERS must give each parameter of its groups to one."
            )


def _check_fit(current: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    for name in [*current, *stored]:
        here, there = (
            f"of shape {tuple(tensors[name].shape)}" if name in tensors else "absent"
            for tensors in (current, stored)
        )
        if here != there:
            raise CheckpointError(
                f"{name} is {there} in the checkpoint and {here} here.\n"
                "  It comes from another model or optimizer: use the settings it was made with."
            )
