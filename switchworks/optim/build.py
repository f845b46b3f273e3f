"""From a model's parameters and an OptimConfig to one object that takes steps."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchworks.config import CheckpointError
from switchworks.optim.adafactor import EPS_SCALE, Adafactor
from switchworks.optim.clip import clip_coefficient, first_nonfinite, global_norm
from switchworks.optim.config import OptimConfig
from switchworks.optim.masters import MasterWeights
from switchworks.optim.schedule import learning_rate

State = dict[str, dict[str, Any]]


class UpdateStats(NamedTuple):
    """What one step did."""

    lr: float
    grad_norm: float
    """Norm of all gradients together, before clipping. If not finite, nothing was updated."""


class Kind(NamedTuple):
    """What of a parameter the optimizers care about."""

    stacked: bool
    """A stack of experts."""
    bias: bool
    """A table of relative positions."""
    vector: bool
    adapter: bool
    """A low-rank matrix that stands beside a frozen one."""

    @property
    def no_decay(self) -> bool:
        """Whether weight decay passes it over."""
        return self.bias or self.vector


class Updater:
    """Masters, optimizer, clipping and schedule as one: gradients in, updated weights out.

    Call `accumulate()` after each micro-batch's backward pass and `step()` after the last. Where
    there is only one, `step()` alone takes its gradients out of the 16-bit parameters, a few at a
    time, so that no float32 copy of all of them is ever there.
    """

    def __init__(
        self, masters: MasterWeights, optimizer: torch.optim.Optimizer, config: OptimConfig
    ) -> None:
        self.masters = masters
        self.optimizer = optimizer
        self.config = config

    def begin(self, step: int, total_steps: int) -> None:
        """Before the first backward pass of step number `step`. Here there is nothing to do."""

    def accumulate(self) -> None:
        """Add the parameters' gradients to those gathered so far, in float32."""
        self.masters.accumulate()

    def step(self, step: int, total_steps: int) -> UpdateStats:
        """Take step number `step` (from 0) of `total_steps` with the gradients gathered so far.

        Afterwards the model holds the new weights and the gradients are gone. If their norm is
        not finite, weights, state and gradients stay as they are, for the caller to look at. A
        parameter without a gradient is left alone, and so is its state.
        """
        if self.masters.accumulating:
            self.accumulate()
        lr = learning_rate(self.config, step, total_steps)
        norm = float(global_norm(list(self.masters.gradients().values())))
        if math.isfinite(norm):
            self._set_rate(lr)
            for names in self.masters.shares():
                self._move(names, clip_coefficient(norm, self.config.clip_norm))
        return UpdateStats(lr, norm)

    def gradients(self) -> dict[str, Tensor]:
        """Name -> gradient gathered so far. The tensors are those in use."""
        return self.masters.gradients()

    def zero(self, names: Iterable[str] | None = None) -> None:
        """Forget the gradients of `names`, or all."""
        self.masters.zero(names)

    def first_nonfinite_gradient(self) -> str | None:
        """The first parameter, in the model's order, whose gradient is not finite, or None."""
        self.accumulate()
        return first_nonfinite(self.masters.gradients().items())

    def float_state(self) -> dict[str, Tensor]:
        """Name -> weight in full precision, for export. The tensors are not copies."""
        return self.masters.float_state()

    def _set_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _move(self, names: list[str], scale: float) -> None:
        """Move all that has a gradient, which is `names` once they are ready."""
        self.masters.prepare_grads(names, scale)
        self.optimizer.step()
        self.masters.copy_to_model(names)
        self.zero(names)

    def state_dict(self) -> State:
        """{"weights": {name: tensor}, "optimizer": {name: {slot: tensor}}}, complete from step 0.

        A frozen parameter is among the weights and has no slots.

        The tensors are those in use, not copies. The learning rate is not in it: it follows from
        the step.
        """
        state = self.optimizer.state
        slots = {
            name: dict(state[master])
            for name, master in self.masters.named().items()
            if master.requires_grad
        }
        return {"weights": self.float_state(), "optimizer": slots}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from `state`, bit for bit; its tensors are copied.

        Also to be called when the tensors of `state_dict()` were filled in place, so that a 16-bit
        model follows its masters.

        Raises CheckpointError, with nothing changed, if a name or a shape does not fit.
        """
        ours, theirs = _flat(self.state_dict()), _flat(state)
        _check_fit(ours, theirs)
        for name, tensor in ours.items():
            tensor.copy_(theirs[name])
        self.masters.copy_to_model()


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    letters: Mapping[str, str],
    config: OptimConfig,
    weights: Mapping[str, Tensor] | None = None,
) -> Updater:
    """An Updater for the parameters, with the optimizer, schedule and clipping of `config`.

    `letters` gives a parameter's dimensions by its name ("E D F", see `dimension_letters`): three
    or more that begin with E make a stack of experts; "_" marks a table of relative positions,
    which like a vector is spared weight decay; R, a rank, marks an adapter. A name without letters
    is judged by its shape. A parameter that requires no gradient is not the optimizer's and has no
    state, only its weight. `weights`: float32 values the masters begin with, see `MasterWeights`.
    """
    masters = MasterWeights(named_parameters, weights)
    groups: dict[Kind, list[nn.Parameter]] = {}
    for name, master in masters.named().items():
        if not master.requires_grad:
            continue
        dims = letters.get(name, "").split()
        kind = Kind(
            stacked=len(dims) > 2 and dims[0] == "E",
            bias="_" in dims,
            vector=master.dim() < 2,
            adapter="R" in dims,
        )
        groups.setdefault(kind, []).append(master)
    return Updater(masters, _optimizer(groups, config), config)


def dimension_letters(model: nn.Module) -> dict[str, str]:
    """Full parameter name -> dimension letters, gathered from the modules' `letters`."""
    known = {name for name, _ in model.named_parameters()}
    found = {
        f"{prefix}.{name}" if prefix else name: letters
        for prefix, module in model.named_modules()
        for name, letters in getattr(module, "letters", {}).items()
    }
    return {name: letters for name, letters in found.items() if name in known}


def _optimizer(
    groups: Mapping[Kind, list[nn.Parameter]], config: OptimConfig
) -> torch.optim.Optimizer:
    if config.name == "adamw":
        return _adamw(groups, config)
    param_groups = [
        {
            "params": parameters,
            "stacked": kind.stacked,
            "scale_floor": _floor(kind, config),
            "weight_decay": 0.0 if kind.no_decay else config.weight_decay,
        }
        for kind, parameters in groups.items()
    ]
    return Adafactor(
        param_groups,
        lr=config.lr,
        beta1=config.betas[0],
        decay_exponent=config.decay_exponent,
        clip_update=config.clip_update,
        parameter_scale=config.parameter_scale,
        min_factored_dim=config.min_factored_dim,
        per_expert=config.per_expert,
    )


def _floor(kind: Kind, config: OptimConfig) -> float:
    if kind.adapter:
        return config.adapter_floor
    return config.relative_bias_floor if kind.bias else EPS_SCALE


def _adamw(groups: Mapping[Kind, list[nn.Parameter]], config: OptimConfig) -> torch.optim.Optimizer:
    """torch's fused AdamW, its state made now, so that `state_dict` is complete before a step."""
    param_groups = [
        {"params": parameters, "weight_decay": 0.0 if kind.no_decay else config.weight_decay}
        for kind, mixed in groups.items()
        for parameters in _by_mesh(mixed)
    ]
    beta1, beta2 = config.betas
    optimizer = torch.optim.AdamW(
        param_groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
    return optimizer


def _by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """A fused update takes plain tensors, or DTensors of one mesh."""
    alike: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        alike.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(alike.values())


def _flat(state: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Every tensor by a name people can read: "NAME (weight)", "NAME (exp_avg)"."""
    flat = {f"{name} (weight)": tensor for name, tensor in state["weights"].items()}
    for name, slots in state["optimizer"].items():
        flat |= {f"{name} ({slot})": tensor for slot, tensor in slots.items()}
    return flat


def _check_fit(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    strangers = [name for name in theirs if name not in ours]
    for name, tensor in ours.items():
        if name not in theirs:
            has = f", but has {strangers[0]}" if strangers else ""
            raise CheckpointError(
                f"The checkpoint has no {name}{has}.\n"
                "  It comes from another model or optimizer: use the settings it was made with."
            )
        if tensor.shape != theirs[name].shape:
            raise CheckpointError(
                f"{name} has shape {tuple(theirs[name].shape)} in the checkpoint and "
                f"{tuple(tensor.shape)} here.\n"
                "  It comes from a model of another size: use the settings it was made with."
            )
    if strangers:
        raise CheckpointError(
            f"The checkpoint has {strangers[0]}, which nothing here takes.\n"
            "  It comes from another model or optimizer: use the settings it was made with."
        )
