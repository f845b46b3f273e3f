"""The parts every block is made of: linear layers, RMS norm, dropout, look-up and dense FFN.

Read first in `model/`. A class attribute that holds a function is a seam: see `SEAMS` in
`model/__init__.py`. Letters: B sequences, L length, D model width, F feed-forward width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from switchworks.model.config import ModelConfig

Matmul = Callable[[Tensor, Any], Tensor]
"""(x, weight) -> the product, in the dtype of x."""


class Linear(nn.Linear):
    """A matrix without bias, stored [outputs, inputs]."""

    matmul: Matmul = staticmethod(F.linear)

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Float[Tensor, "*b I"]) -> Float[Tensor, "*b O"]:
        """x W^T."""
        return self.matmul(x, self.weight)


def normalise(
    x: Float[Tensor, "*b D"], weight: Float[Tensor, "D"], epsilon: float
) -> Float[Tensor, "*b D"]:
    """`x` with mean square 1 along D, scaled; the statistics are taken in float32 or wider."""
    wide = to_float32(x)
    unit = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
    return unit.to(weight.dtype) * weight


class RMSNorm(nn.Module):
    """Divide by the root mean square, multiply by a learned scale; no bias, no mean (T5)."""

    letters = {"weight": "D"}
    normalise: Callable[[Tensor, Tensor, float], Tensor] = staticmethod(normalise)

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*b D"]) -> Float[Tensor, "*b D"]:
        """See `normalise`."""
        return self.normalise(x, self.weight, self.epsilon)


def to_float32(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`x` in float32, unless its dtype is wider: what must not be computed in 16 bits."""
    return x.to(compute_dtype(x.dtype))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float32 for 16 bits, else `dtype`: that of softmaxes, norms and sums."""
    return torch.promote_types(dtype, torch.float32)


class SharedDropout(nn.Module):
    """Dropout whose mask is the same at every position of the sequence, as in Mesh-TensorFlow.

    The second to last dimension of the input is the one that shares. Drawing one mask for all
    positions is also what keeps dropout cheap.
    """

    draw: Callable[[Tensor, float], Tensor] = staticmethod(F.dropout)

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "*b L D"]) -> Float[Tensor, "*b L D"]:
        """`x` in evaluation; in training a share `rate` of its columns zeroed, the rest scaled."""
        if not self.training or self.rate == 0:
            return x
        return x * self.draw(torch.ones_like(x[..., :1, :]), self.rate)


def look_up(table: Float[Tensor, "V D"], ids: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
    """The rows of `table` at `ids`, whose gradients are summed in float32 whatever its dtype.

    Thousands of positions may share a row. Summed one by one in bfloat16, terms beyond some
    hundreds are lost to rounding: 10 % of the gradient of a relative bias over 256 positions.
    """
    if table.dtype in (torch.bfloat16, torch.float16) and torch.is_grad_enabled():
        return F.embedding(ids, table.float()).to(table.dtype)
    return F.embedding(ids, table)


class Embedding(nn.Embedding):
    """A table of vectors, one for each id of the vocabulary."""

    look_up: Callable[[Tensor, Tensor], Tensor] = staticmethod(look_up)

    def forward(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        """The vectors of `ids`, see `look_up`."""
        return self.look_up(self.weight, ids)


ACTIVATIONS = {"relu": F.relu, "gelu": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}


def activate(hidden: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """The non-linearity of an FFN or expert; with `gate`, the activated gate times `hidden`."""
    function = ACTIVATIONS[activation]
    return function(hidden) if gate is None else function(gate) * hidden


class FFN(nn.Module):
    """The dense feed-forward layer: two matrices, three when gated, no bias."""

    letters = {"w_in.weight": "F D", "w_gate.weight": "F D", "w_out.weight": "D F"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.w_in = Linear(config.d_model, config.d_ff)
        self.w_gate = Linear(config.d_model, config.d_ff) if config.gated else None
        self.w_out = Linear(config.d_ff, config.d_model)
        self.dropout = SharedDropout(config.dropout)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """The layer's output, before the block's dropout and residual."""
        gate = None if self.w_gate is None else self.w_gate(x)
        return self.w_out(self.dropout(activate(self.w_in(x), gate, self.activation)))
