"""What a training run is at a moment: enough to go on from there, bit for bit."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from switchworks.model import SwitchTransformer
from switchworks.model.routing import Router
from switchworks.optim.build import Updater, build_optimizer, dimension_letters
from switchworks.parallel import ALONE, Ranks, parallelize
from switchworks.parallel.apply import like
from switchworks.parallel.gradients import GradientSum
from switchworks.training.experiment import Experiment


@dataclass
class TrainState:
    """Model, optimizer and counters. Data order and noise need no state: both follow from seed
    and step."""

    experiment: Experiment
    model: SwitchTransformer
    updater: Updater
    gradients: GradientSum
    """Makes the gradients of this rank's rows those of the whole batch."""
    ranks: Ranks = ALONE
    """Those that train together."""
    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Input and target tokens seen, padding not counted."""
    seconds: float = 0.0
    """Time spent in steps, over all sittings; validation and saving not counted."""
    teacher: SwitchTransformer | None = None
    """Whom the model learns from if `experiment.distil` says so. No step changes it, so it is in
    no checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Every tensor that a step changes: float32 weights and optimizer state, not copied."""
        return self.updater.state_dict()

    def about(self) -> dict[str, Any]:
        """The counters, plain numbers that go into a checkpoint."""
        return {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}

    def restore(self, contents: dict[str, Any], about: dict[str, Any]) -> None:
        """Be where the checkpoint with these contents was."""
        self.updater.load_state_dict(contents)
        self.step, self.tokens = about["step"], about["tokens"]
        self.seconds = about["seconds"]


def build_state(
    experiment: Experiment,
    model: SwitchTransformer | None = None,
    teacher: SwitchTransformer | None = None,
    ranks: Ranks = ALONE,
) -> TrainState:
    """Step 0 of `experiment`, with the float32 weights of `model` or else those of its seed.

    The model is taken over: with bfloat16 its weights are cast and the float32 ones become the
    optimizer's masters, and on a mesh each of the `ranks` keeps its part of all of them. The
    `teacher` is taken over too: cast as the model is, in evaluation mode and without gradients, so
    that it drops no token and draws no noise.
    """
    assert (teacher is None) == (experiment.distil is None)
    assert experiment.precision != "auto", "train() settles it first"
    model = model or SwitchTransformer(experiment.model, seed=experiment.seed)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    dtype = getattr(torch, experiment.precision)
    cast_for_compute(model, dtype)
    letters = dimension_letters(model)
    gradients = parallelize(model, ranks.mesh, letters, shard=experiment.mesh.shard)
    for name, parameter in model.named_parameters():
        weights[name] = like(weights[name], parameter)  # one after the other, so that wholes go
    updater = build_optimizer(model.named_parameters(), letters, experiment.optim, weights)
    if teacher is not None:
        cast_for_compute(teacher, dtype)
        teacher.to(model.embedding.weight.device).eval().requires_grad_(False)
    return TrainState(experiment, model, updater, gradients, ranks, teacher=teacher)


def cast_for_compute(model: nn.Module, dtype: torch.dtype) -> None:
    """Every parameter of `model` in `dtype`, but routers' in at least float32 (section 2.4)."""
    for module in model.modules():
        if isinstance(module, Router) and dtype != torch.float64:
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
