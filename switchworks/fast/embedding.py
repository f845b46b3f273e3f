"""Looking up rows of a 16-bit table without a float32 copy of it.

The reference (`model.layers.look_up`) widens the whole table in each pass, so that gradients of
rows that many positions share are summed in float32. Here rows are taken as they are, and only
the sum of the gradients is float32.

Letters: V vocabulary, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


def look_up(table: Float[Tensor, "V D"], ids: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
    """The rows of `table` at `ids`, whose gradients are summed in float32 and rounded once."""
    if table.dtype not in (torch.bfloat16, torch.float16) or not torch.is_grad_enabled():
        return F.embedding(ids, table)
    return _LookUp.apply(table, ids)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Float[Tensor, "V D"], ids: Int[Tensor, "..."]) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = len(table)
        return F.embedding(ids, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Float[Tensor, "... D"]) -> tuple[Float[Tensor, "V D"], None]:
        (ids,) = ctx.saved_tensors
        sums = grad_out.new_zeros(ctx.rows, grad_out.shape[-1], dtype=torch.float32)
        sums.index_add_(0, ids.flatten(), grad_out.flatten(0, -2).float())
        return sums.to(grad_out.dtype), None
