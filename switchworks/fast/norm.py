"""RMS norm that keeps its input and one number per row for the backward pass, and no more.

The reference is `model.layers.normalise`. Letters: N rows, D width.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchworks.model import compute_dtype

_BLOCK = 2**18
"""Numbers converted at once: 1 MB in float32."""


def rms_norm(
    x: Float[Tensor, "*b D"], weight: Float[Tensor, "D"], epsilon: float
) -> Float[Tensor, "*b D"]:
    """`x` with mean square 1 along D, in the dtype of `weight`, times `weight`; statistics in
    float32 or wider."""
    return _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, epsilon).view(x.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "N D"], weight: Float[Tensor, "D"], epsilon: float
    ) -> Float[Tensor, "N D"]:
        scale = x.new_empty((len(x), 1), dtype=compute_dtype(x.dtype))
        y = x.new_empty(x.shape, dtype=weight.dtype)
        for rows in _rows(x):
            wide = x[rows].to(scale.dtype)
            scale[rows] = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
            torch.mul((wide * scale[rows]).to(weight.dtype), weight, out=y[rows])
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Float[Tensor, "N D"]
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "D"], None]:
        x, weight, scale = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros(weight.shape, dtype=scale.dtype, device=x.device)
        wide_weight = weight.to(scale.dtype)
        for rows in _rows(x):
            unit = x[rows].to(scale.dtype) * scale[rows]
            grad = grad_y[rows].to(scale.dtype)
            grad_weight += (grad * unit).sum(dim=0)
            # d(x s)/dx with s = rsqrt(mean x^2 + eps): the part of the gradient along x goes.
            grad = grad * wide_weight
            along = (grad * unit).mean(dim=-1, keepdim=True)
            grad_x[rows] = (grad - unit.mul_(along)).mul_(scale[rows]).to(x.dtype)
        return grad_x, grad_weight.to(weight.dtype), None


def _rows(x: Float[Tensor, "N D"]) -> list[slice]:
    step = max(1, _BLOCK // x.shape[1]) if x.device.type == "cpu" else max(1, len(x))
    return [slice(first, first + step) for first in range(0, len(x), step)]
