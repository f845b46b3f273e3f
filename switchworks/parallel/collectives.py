"""Sums and exchanges over ranks with gradients.

Two sums are all that splitting a layer's width needs (Megatron-LM, section 3): before its first
product `copy_in`, after its second `sum_out`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed._functional_collectives as functional
from jaxtyping import Float
from torch import Tensor
from torch.distributed import ProcessGroup


class _CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, of_x: Tensor) -> tuple[Tensor, None]:
        return _summed(of_x, ctx.group), None


class _SumOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, of_sum: Tensor) -> tuple[Tensor, None]:
        return of_sum, None


def copy_in(x: Float[Tensor, "..."], group: ProcessGroup) -> Float[Tensor, "..."]:
    """`x`, whose gradient is the sum over ranks that each go on with a part of the width."""
    return _CopyIn.apply(x, group)


def sum_out(x: Float[Tensor, "..."], group: ProcessGroup) -> Float[Tensor, "..."]:
    """The sum of `x` over ranks that all go on with it and so have the same gradient."""
    return _SumOut.apply(x, group)


def exchange(
    rows: Float[Tensor, "N D"],
    group: ProcessGroup,
    *,
    send: Sequence[int] | None = None,
    receive: Sequence[int] | None = None,
) -> Float[Tensor, "M D"]:
    """`send[r]` rows go to rank r and `receive[r]` come from it, in order; None: equally many.

    Rows move in their own dtype, and so do their gradients, the other way. None at all is fine.
    """
    splits = (None, None) if send is None or receive is None else (list(receive), list(send))
    return functional.wait_tensor(
        functional.all_to_all_single_autograd(rows.contiguous(), *splits, group)
    )


def _summed(x: Tensor, group: ProcessGroup) -> Tensor:
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group))
