"""Sums and exchanges over ranks with gradients.

Two sums are all that splitting a layer's width needs (Megatron-LM, section 3): before its first
product `copy_to_tp`, after its second `reduce_from_tp`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from jaxtyping import Float
from torch import Tensor
from torch.distributed import ProcessGroup


class _CopyToTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor, None]:
        return _summed(grad_x, ctx.group), None


class _ReduceFromTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, of_sum: Tensor) -> tuple[Tensor, None]:
        return of_sum, None


def copy_to_tp(x: Float[Tensor, "..."], group: ProcessGroup) -> Float[Tensor, "..."]:
    """`x`, whose gradient is the sum over ranks that each go on with a part of the width."""
    return _CopyToTP.apply(x, group)


def reduce_from_tp(x: Float[Tensor, "..."], group: ProcessGroup) -> Float[Tensor, "..."]:
    """The sum of `x` over ranks that all go on with it and so have the same gradient."""
    return _ReduceFromTP.apply(x, group)


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


class AsyncAllToAll:
    """Rows that are on their way to other ranks, and later their gradients on the way back."""

    def __init__(
        self, group: ProcessGroup, send: Sequence[int] | None, receive: Sequence[int] | None
    ) -> None:
        self.group = group
        self.send = None if send is None else list(send)
        self.receive = None if receive is None else list(receive)
        self.rows: Tensor
        """What comes; not to be read before `finish`."""
        self._under_way: tuple[Any, Tensor, Tensor]

    def start(self, rows: Tensor, *, back: bool) -> Tensor:
        """Where `rows` will be on the other side."""
        going, coming = (self.receive, self.send) if back else (self.send, self.receive)
        rows = rows.contiguous()
        space = rows.new_empty(len(rows) if coming is None else sum(coming), *rows.shape[1:])
        work = dist.all_to_all_single(space, rows, coming, going, group=self.group, async_op=True)
        self._under_way = work, rows, space  # both are kept until they have landed
        return space

    def finish(self) -> Tensor:
        """The rows, once they are there."""
        work, _, space = self._under_way
        work.wait()
        del self._under_way
        return space


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: AsyncAllToAll) -> Tensor:
        ctx.flight = flight
        return flight.start(rows, back=False)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.finish(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: AsyncAllToAll) -> Tensor:
        ctx.flight = flight
        flight.finish()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, of_rows: Tensor) -> tuple[Tensor, None]:
        ctx.flight.start(of_rows, back=True)
        return of_rows, None  # only has the shape; what `_Start` returns is what travelled


def start(
    rows: Float[Tensor, "N D"],
    group: ProcessGroup,
    *,
    send: Sequence[int] | None = None,
    receive: Sequence[int] | None = None,
) -> AsyncAllToAll:
    """Begin to `exchange` rows; `finish` ends it. What is computed between the two hides it.

    The gradient of what is computed after `finish` begins its way back as soon as it is there, and
    is waited for where the rows came from.
    """
    flight = AsyncAllToAll(group, send, receive)
    flight.rows = _Start.apply(rows, flight)
    return flight


def finish(flight: AsyncAllToAll) -> Float[Tensor, "M D"]:
    """The rows that have come."""
    return _Finish.apply(flight.rows, flight)


def _summed(x: Tensor, group: ProcessGroup) -> Tensor:
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group))
