"""From a model's parameters and an OptimConfig to one object that takes steps.

With `BackwardUpdater` the gradients of all weights never exist together: a backward pass that has
accumulated the whole gradient of a weight does not read that weight again. Only a sum over
micro-batches or ranks, or clipping by the norm of all gradients, needs them side by side.
"""

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from switchworks.config import ConfigError, flatten
from switchworks.optim.config import OptimConfig, learning_rate, optimizer_builder
from switchworks.optim.groups import group_parameters
from switchworks.optim.masters import MasterWeights
from switchworks.optim.sharded_stats import local, sharding_of

State = dict[str, dict[str, Any]]

LARGE = 2**16
"""Elements from which a weight is updated during the pass. Smaller ones are updated together after
it, since calling an optimizer for each would cost more than its arithmetic."""
BUCKET = 2**24
"""Elements of large gradients that are updated together: 64 MB in float32."""


class UpdateStats(NamedTuple):
    """What one step did."""

    lr: float
    """The scheduled learning rate; a group's rate is a factor on it."""
    grad_norm: float
    """Norm of all gradients together, before clipping. If not finite, nothing was updated."""


@dataclass(eq=False)
class Updater:
    """Masters, optimizers, clipping and schedule as one: gradients in, updated weights out.

    Call `masters.accumulate()` after each micro-batch's backward pass and `step()` after the last.
    With a single micro-batch call `step()` alone: it casts 16-bit gradients to float32 bucket by
    bucket, so that a float32 copy of all of them never exists.
    """

    masters: MasterWeights
    optimizers: list[torch.optim.Optimizer]
    config: OptimConfig

    def begin(self, step: int, total_steps: int) -> None:
        """Call before the first backward pass of step number `step`. Does nothing here."""

    def step(self, step: int, total_steps: int) -> UpdateStats:
        """Take step number `step` (from 0) of `total_steps` with the accumulated gradients.

        Afterwards the model holds the new weights and the gradients are gone. If their norm is
        not finite, weights, state and gradients stay as they are, for the caller to inspect. A
        parameter without a gradient keeps its value and its state.
        """
        if self.masters.accumulating:
            self.masters.accumulate()
        lr = learning_rate(self.config, step, total_steps)
        norm = float(global_norm(list(self.masters.gradients().values())))
        if math.isfinite(norm):
            self._set_rate(lr)
            for names in self.masters.buckets():
                self._update(names, clip_coefficient(norm, self.config.clip_norm))
        return UpdateStats(lr, norm)

    def first_nonfinite_gradient(self) -> str | None:
        """The first parameter, in the model's order, whose gradient is not finite, or None."""
        self.masters.accumulate()
        return first_nonfinite(self.masters.gradients().items())

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
        self.masters.zero(names)

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
            for name, master in self.masters.named.items()
            if master.requires_grad
        }
        return {"weights": self.masters.float_state(), "optimizer": slots}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Copy `state` in; training then continues bit for bit.

        Call it also after the tensors of `state_dict()` were filled in place, so that a 16-bit
        model follows its masters. `Checkpoints.load` has checked names and shapes.
        """
        stored = flatten(state)
        for name, tensor in flatten(self.state_dict()).items():
            tensor.copy_(stored[name])
        self.masters.copy_to_model()


@dataclass(eq=False)
class BackwardUpdater(Updater):
    """An `Updater` that updates large weights in the backward pass, to the same values bit for bit.

    Call `begin()`, one backward pass, and `step()`, which updates the rest. From the first gradient
    that is not finite nothing is updated, and `step()` reports it in the norm; earlier updates of
    the same step stay.
    """

    def __post_init__(self) -> None:
        assert self.config.clip_norm is None, "clipping needs the norm of all gradients"
        self._in_step = False
        self._bucket: list[str] = []
        """Names of large weights with a gradient, not yet updated."""
        self._small: dict[str, Tensor | None] = {}
        self._norms: list[float] = []
        # The hooks hold a weak reference: the model would otherwise keep its updater, and the
        # updater its model, alive until the garbage collector runs.
        updater: weakref.ref[BackwardUpdater] = weakref.ref(self)
        for name, parameter in self.masters.parameters.items():
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
        parameters = self.masters.parameters
        for name, grad in self._small.items():
            parameters[name].grad = grad
        self._small = {}
        self.update(list(self.masters.gradients()))
        lr = learning_rate(self.config, step, total_steps)
        return UpdateStats(lr, math.hypot(*self._norms))

    def update(self, names: list[str]) -> None:
        """Update `names`, all weights that have a gradient now, if all norms so far are finite."""
        gradients = self.masters.gradients()
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
        parameters = self.masters.parameters
        if sum(parameters[other].numel() for other in self._bucket) >= BUCKET:
            names, self._bucket = self._bucket, []
            self.update(names)


def _on_grad(reference: "weakref.ref[BackwardUpdater]", name: str, parameter: nn.Parameter) -> None:
    if (updater := reference()) is not None:
        updater.on_grad(name, parameter)


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
    groups = group_parameters(masters.named, letters, config)
    optimizers = optimizer_builder(config.name)(groups, config)
    _check_complete(masters, optimizers, config.name)
    return Updater(masters, optimizers, config)


def _check_complete(
    masters: MasterWeights, optimizers: list[torch.optim.Optimizer], name: str
) -> None:
    groups = chain.from_iterable(optimizer.param_groups for optimizer in optimizers)
    held = Counter(parameter for group in groups for parameter in group["params"])
    for parameter_name, master in masters.named.items():
        if held[master] != int(master.requires_grad):
            raise ConfigError(
                f"optim.name = {name}: {parameter_name} is in {held[master]} parameter groups and "
                f"should be in {int(master.requires_grad)}.\n"
                "  The function in OPTIMIZERS must give each parameter of its groups to one."
            )


def global_norm(grads: Sequence[Tensor]) -> Float[Tensor, ""]:
    """The Euclidean norm of all `grads` taken as one vector, in at least float32.

    NaN or infinite if any element is, or if the squares of one tensor overflow. 0 without
    gradients. A DTensor, on any mesh, counts as the whole tensor; then all ranks must call this.
    """
    if not grads:
        return torch.zeros(())
    if any(isinstance(grad, DTensor) for grad in grads):
        return _norm_over_ranks(grads)
    dtype = torch.promote_types(torch.float32, grads[0].dtype)
    # Row by row first: on the CPU a float32 sum over millions of squares is off by 3e-5 and more,
    # by an amount that depends on how the elements are sharded over ranks.
    rows = [
        torch.linalg.vector_norm(grad, dim=-1, dtype=dtype) if grad.dim() > 1 else grad.to(dtype)
        for grad in grads
    ]
    return torch.nn.utils.get_total_norm(rows)


def _norm_over_ranks(grads: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Each rank's squares, divided by the number of ranks that hold the same part, and summed."""
    world = dist.get_world_size()
    by_copies: dict[int, list[Tensor]] = {}
    for grad in grads:
        groups = [group for groups in sharding_of(grad).groups for group in groups]
        parts = math.prod(len(dist.get_process_group_ranks(group)) for group in groups)
        by_copies.setdefault(world // parts, []).append(local(grad))
    squares = [global_norm(parts).square() / copies for copies, parts in by_copies.items()]
    total = torch.stack(squares).sum()
    dist.all_reduce(total)
    return total.sqrt()


def clip_coefficient(norm: float, max_norm: float | None) -> float:
    """The factor that brings gradients of global norm `norm` to at most `max_norm`. 1 if they are
    within it, if `max_norm` is None, and if the norm is not finite."""
    if max_norm is None or not math.isfinite(norm) or norm <= max_norm:
        return 1.0
    return max_norm / norm


def first_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first of `tensors` that holds NaN or infinity; None if all are finite. Of a
    DTensor only this rank's part is checked."""
    return next((name for name, tensor in tensors if not local(tensor).isfinite().all()), None)
