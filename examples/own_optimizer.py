"""An optimizer of your own: Lion for the matrices, Adafactor for the rest.

    python examples/own_optimizer.py TEXT_FOLDER RUN_DIR      # on a laptop: seconds, no download
    switchworks train examples.own_optimizer:lion_tiny --data.path TEXT_FOLDER

Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675) moves each weight by the sign of a mean of
gradients. It is written for one tensor; float32 masters, clipping, the learning rate's schedule,
checkpoints, resuming and meshes come from switchworks.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from switchworks import Experiment, train
from switchworks.optim import OPTIMIZERS, OptimConfig, ParameterGroup, local, optimizer_builder
from switchworks.recipes import RECIPES


class Lion(torch.optim.Optimizer):
    """Sign of the momentum mixed with the gradient; weight decay is decoupled."""

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, ...]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})
        # The state exists from the start, so that a checkpoint can be loaded into it.
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["momentum"] = torch.zeros_like(weight, requires_grad=False)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every weight that has a gradient, by the rate of its group."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.move(weight, weight.grad, self.state[weight]["momentum"], group)

    def move(self, weight: Tensor, grad: Tensor, momentum: Tensor, group: dict) -> None:
        """One step. `local` is the part of a tensor that this rank has, all of it on one rank."""
        weight, grad, momentum = local(weight), local(grad), local(momentum)
        beta1, beta2 = group["betas"]
        update = momentum.lerp(grad, 1 - beta1).sign_()
        weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
        momentum.lerp_(grad, 1 - beta2)


def build_lion(
    groups: Sequence[ParameterGroup], config: OptimConfig
) -> list[torch.optim.Optimizer]:
    """Lion for matrices and expert stacks, Adafactor at 100 times the rate for everything else."""
    kinds = ("matrix", "experts")
    matrices = [group.settings() for group in groups if group.kind in kinds]
    rest = [group._replace(rate=100 * group.rate) for group in groups if group.kind not in kinds]
    lion = Lion(matrices, config.lr, config.betas)
    return [lion, *optimizer_builder("adafactor")(rest, config)]


OPTIMIZERS["lion"] = build_lion


def lion_tiny() -> Experiment:
    """The recipe `tiny`, trained by Lion: a mere 60 steps."""
    optim = OptimConfig(name="lion", lr=1e-3, schedule="cosine", warmup_steps=10, betas=(0.9, 0.99))
    return replace(RECIPES["tiny"](), name="lion_tiny", steps=60, optim=optim)


if __name__ == "__main__":
    text, run_dir = sys.argv[1:]
    recipe = lion_tiny()
    train(replace(recipe, data=replace(recipe.data, path=text)), run_dir)
