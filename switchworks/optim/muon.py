"""Muon: momentum, orthogonalised by Newton-Schulz iterations, for matrices and expert stacks.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/); the scale of the update is that of
Liu et al. 2025 ("Muon is scalable for LLM training", https://arxiv.org/abs/2502.16982), with which
a rate and a weight decay tuned for AdamW carry over. torch.optim.Muon is the same for one matrix;
it refuses a stack, and a DTensor it would orthogonalise part by part.

Letters: E experts, D F a matrix.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from switchworks.optim.config import OptimConfig, optimizer_builder
from switchworks.optim.groups import ParameterGroup
from switchworks.optim.sharded_stats import gather_matrix, local, take_shard

ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic: chosen for the steepest slope at 0, so singular values end in about [0.7, 1.2]
and not at 1."""
UPDATE_RMS = 0.2
"""Root mean square of an update at a learning rate of 1, about that of AdamW's."""


class Muon(torch.optim.Optimizer):
    """Muon for parameters of two dimensions, or of three, of which the first counts experts.

    A matrix W [D, F] with gradient G moves by -lr * 0.2 * sqrt(max(D, F)) * orthogonalise(N), where
    M = momentum * M + (1 - momentum) * G and N = momentum * M + (1 - momentum) * G (Nesterov).
    Weight decay is decoupled: W shrinks by lr * weight_decay first. An expert without tokens has a
    gradient of 0 and still moves along its old momentum, since orthogonalising undoes its decay.

    Parameters are float32 or float64 and so is the state, which exists from the start. Each rank
    that holds a part of a matrix gathers and orthogonalises the whole, and moves its part.
    """

    def __init__(
        self, params: Any, *, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with state for its parameters. Raises ValueError for a vector."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dim() not in (2, 3):
                raise ValueError(
                    f"Muon moves matrices and stacks of them, not shape {tuple(parameter.shape)}.\n"
                    "  Give it to another optimizer, such as AdamW."
                )
            self.state[parameter]["momentum"] = torch.zeros_like(parameter, requires_grad=False)

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        """Update every parameter that has a gradient; the others and their state stay."""
        if closure is not None:
            raise ValueError("step takes no closure.\n  Call backward() first, then step().")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        weight, grad, beta = local(parameter), local(grad), group["momentum"]
        momentum = local(self.state[parameter]["momentum"]).lerp_(grad, 1 - beta)
        # What follows needs the whole matrix: singular vectors of a part are not parts of them.
        matrix = gather_matrix(grad.lerp(momentum, beta), parameter)
        # bfloat16 as torch.optim.Muon has it, but not on CPUs, which may emulate it.
        dtype = torch.bfloat16 if matrix.device.type == "cuda" else matrix.dtype
        update = take_shard(orthogonalise(matrix, dtype), parameter)
        scale = UPDATE_RMS * math.sqrt(max(parameter.shape[-2:]))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-group["lr"] * scale)


def orthogonalise(x: Float[Tensor, "*E D F"], dtype: torch.dtype) -> Float[Tensor, "*E D F"]:
    """Each matrix with its singular values moved to about 1, its singular vectors kept: near U V^T.

    Computed in `dtype`, in which the result is. A matrix of zeros stays one.
    """
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).reshape(-1, *sorted(x.shape[-2:]))  # the smaller Gram matrix
    # The Frobenius norm bounds the largest singular value: the iteration converges from [0, 1].
    y = (y / torch.linalg.matrix_norm(y, keepdim=True).clamp(min=1e-7)).to(dtype)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):  # s -> a s + b s^3 + c s^5 for every singular value s
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).reshape(x.shape)


def build_muon(groups: Sequence[ParameterGroup], config: OptimConfig) -> list[Any]:
    """Muon for the groups of matrices and expert stacks, `config.fallback` for the others."""
    kinds = ("matrix", "experts")
    matrices = [group for group in groups if group.kind in kinds]
    # Rates are factors on the scheduled `lr`, so that both follow one schedule.
    factor = 1.0 if config.fallback_lr is None else config.fallback_lr / config.lr
    others = [g._replace(rate=g.rate * factor) for g in groups if g.kind not in kinds]
    optimizers: list[Any] = []
    if matrices:
        settings = [group.settings() for group in matrices]
        optimizers.append(Muon(settings, lr=config.lr, momentum=config.momentum))
    if others:
        optimizers += optimizer_builder(config.fallback)(others, config)
    return optimizers
