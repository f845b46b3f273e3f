"""What a training run is at a moment: enough to go on from there, bit for bit."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from switchworks.model import SwitchTransformer
from switchworks.model.routing import Router
from switchworks.optim.build import Updater
from switchworks.train.experiment import Experiment


@dataclass
class TrainState:
    """Model, optimizer and counters. Data order and noise need no state: both follow from seed
    and step."""

    experiment: Experiment
    model: SwitchTransformer
    updater: Updater
    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Input and target tokens seen, padding not counted."""
    seconds: float = 0.0
    """Time spent in steps, over all sittings; validation and saving not counted."""

    def state_dict(self) -> dict[str, Any]:
        """Everything to save: float32 weights and optimizer state."""
        return self.updater.state_dict()

    def about(self) -> dict[str, Any]:
        """The counters, plain numbers that go into the checkpoint's manifest."""
        return {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}


def build_state(experiment: Experiment) -> TrainState:
    """A fresh run of `experiment`: first values from its seed, step 0."""
    model = SwitchTransformer(experiment.model, seed=experiment.seed)
    return start_from(experiment, model)


def start_from(experiment: Experiment, model: SwitchTransformer) -> TrainState:
    """A fresh run of `experiment` that begins with the float32 weights of `model`."""
    raise NotImplementedError


def cast_for_compute(model: nn.Module, dtype: torch.dtype) -> None:
    """Every floating-point parameter of `model` in `dtype`, but routers in float32 (section 2.4)."""
    for module in model.modules():
        if isinstance(module, Router):
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
