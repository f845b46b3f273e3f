"""Sums and exchanges over ranks with gradients, and the sum of gradients over ranks.

Tensor parallelism needs two sums (Megatron-LM, section 3): `copy_to_tp` before the first product of
a split layer and `reduce_from_tp` after the second. Expert parallelism needs the all-to-all.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only


class _SumOverTP(torch.autograd.Function):
    """The sum over the ranks of `group`, in the forward pass or in the backward pass alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, sums: bool) -> Tensor:
        ctx.group, ctx.sums = group, sums
        return _all_reduce(x, group) if sums else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad if ctx.sums else _all_reduce(grad, ctx.group), None, None


def copy_to_tp(x: Float[Tensor, "..."], group: ProcessGroup) -> Float[Tensor, "..."]:
    """`x` itself; its gradient is summed over the ranks, each of which computes a part of the
    width."""
    return _SumOverTP.apply(x, group, False)


def reduce_from_tp(x: Float[Tensor, "..."], group: ProcessGroup) -> Float[Tensor, "..."]:
    """The sum of `x` over the ranks; the gradient is passed on, as all ranks have the same."""
    return _SumOverTP.apply(x, group, True)


@dataclass(eq=False)
class AsyncAllToAll:
    """An all-to-all that has been started and not finished, and later that of its gradients.

    The first `send[0]` rows go to rank 0 and the next `send[1]` to rank 1; the first `receive[0]`
    rows of the result come from rank 0, and so on. None: equally many. Counts may be 0. Rows keep
    their dtype, and so do their gradients on the way back.
    """

    group: ProcessGroup
    send: list[int] | None
    receive: list[int] | None
    _pending: tuple[Any, Tensor, Tensor] | None = None

    def start(self, rows: Tensor, *, backward: bool) -> Tensor:
        """Start to send `rows` and return the tensor that will hold those received."""
        sent, received = self.send, self.receive
        if backward:  # gradients of received rows go back to where the rows came from
            sent, received = received, sent
        rows = rows.contiguous()
        result = rows.new_empty(len(rows) if received is None else sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(result, rows, received, sent, self.group, async_op=True)
        self._pending = work, rows, result  # both buffers are in use until `work` is done
        return result

    def finish(self) -> Tensor:
        """Wait for the rows and return them."""
        assert self._pending is not None
        work, _, result = self._pending
        work.wait()
        self._pending = None
        return result


# Autograd runs `_Finish.backward` as soon as the gradient of the received rows is there, and
# `_Start.backward` when the gradient of the rows sent is needed. So the first starts the exchange
# of gradients and the second waits for it, and what autograd does in between overlaps with it.
class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: AsyncAllToAll) -> Tensor:
        ctx.exchange = exchange
        return exchange.start(rows, backward=False)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.finish(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: AsyncAllToAll) -> Tensor:
        ctx.exchange = exchange
        exchange.finish()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.start(grad_rows, backward=True)
        # Autograd wants a gradient of the shape of `rows`; `_Start.backward` ignores its values.
        return grad_rows, None


def exchange(
    group: ProcessGroup,
    rows: Float[Tensor, "N D"],
    send: list[int] | None = None,
    receive: list[int] | None = None,
) -> Callable[[], Float[Tensor, "M D"]]:
    """Start to exchange rows; the returned function waits for those received. What is computed in
    between overlaps with it, and so does what the backward pass computes there."""
    exchanging = AsyncAllToAll(group, send, receive)
    received = _Start.apply(rows, exchanging)
    return lambda: _Finish.apply(received, exchanging)


def to_local(weight: Any) -> Any:
    """This rank's shard of a weight, or of each in a structure of several."""
    return tree_map_only(DTensor, lambda each: each.to_local(), weight)


def _all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group))


_BUCKET = 2**23
"""Numbers summed by one all-reduce."""


@dataclass(frozen=True, eq=False)
class GradientSum:
    """Sums the gradients of `model` over the ranks that saw different rows.

    `groups` has the ranks to sum over for those weights, by name, that FSDP does not handle. Each
    rank's loss is its share of the whole batch's, so gradients are added, never averaged.
    """

    model: nn.Module
    groups: Mapping[str, ProcessGroup]

    def expect(self, *, last: bool) -> None:
        """Call before each micro-batch: FSDP sums gradients in the last one alone."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)

    @torch.no_grad()
    def finish(self, gradients: Mapping[str, Tensor]) -> None:
        """Call after the last micro-batch: `gradients`, by name, become those of the whole batch,
        in place.

        Every rank has gradients of the same weights: a rank without tokens for an expert still
        runs it, on zero rows.
        """
        members: dict[ProcessGroup, list[Tensor]] = {}
        for name, group in self.groups.items():
            if name in gradients:
                members.setdefault(group, []).append(to_local(gradients[name]))
        for group, tensors in members.items():
            for bucket in _buckets(tensors):
                # One call for many small tensors: each would cost a latency of its own.
                flat = torch.cat([tensor.flatten() for tensor in bucket])
                dist.all_reduce(flat, group=group)
                parts = flat.split([tensor.numel() for tensor in bucket])
                for tensor, part in zip(bucket, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one dtype, at least `_BUCKET` numbers in all but the last of a dtype.
    The order is that of the names, the same on every rank, so buckets match."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(member.numel() for member in bucket) >= _BUCKET
        if bucket and (full or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
