"""Statistics of tensors of which each rank holds a part.

A `DTensor` knows what is where. The optimizer works on the parts as plain tensors, and asks here
for what depends on all of them. For a tensor that is whole nothing is exchanged.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, Shard


def local(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor`, in the same memory: all of it unless it is a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Sharding(NamedTuple):
    """How a tensor is spread over ranks, evenly and in contiguous ranges."""

    shape: tuple[int, ...]
    """Of the whole."""
    groups: tuple[tuple[ProcessGroup, ...], ...]
    """For each dimension the ranks that hold its parts: a group per axis of the mesh."""

    @property
    def whole(self) -> bool:
        """Whether this rank has all of it."""
        return not any(self.groups)

    def moved(self, dims: tuple[int, int] | None) -> "Sharding":
        """That of `tensor.movedim(dims, (-2, -1))`; None: the same."""
        if dims is None:
            return self
        order = [dim for dim in range(len(self.shape)) if dim not in dims] + list(dims)
        return Sharding(
            tuple(self.shape[dim] for dim in order), tuple(self.groups[dim] for dim in order)
        )

    def mean_over(self, sums: Float[Tensor, "..."], dim: int) -> Float[Tensor, "..."]:
        """The mean over dimension `dim` of the whole, from each part's `sums` over it; in place."""
        for group in self.groups[dim]:
            dist.all_reduce(sums, group=group)
        return sums.div_(self.shape[dim])

    def mean(self, x: Float[Tensor, "..."], first: int) -> Float[Tensor, "..."]:
        """The mean of `x` over its dimensions from `first` on, which are kept with size 1.

        `x` has the tensor's dimensions, or all but the last, over which each part is summed.
        """
        dims = tuple(range(first, x.dim()))
        if not dims:
            return x
        if self.whole:
            return x.mean(dim=dims, keepdim=True)
        total = x.sum(dim=dims, keepdim=True)
        for groups in self.groups[first:]:
            for group in groups:
                dist.all_reduce(total, group=group)
        return total.div_(math.prod(self.shape[first : x.dim()]))


def sharding_of(tensor: Tensor) -> Sharding:
    """How `tensor` is spread; a plain tensor is not."""
    groups: list[list[ProcessGroup]] = [[] for _ in range(tensor.dim())]
    if isinstance(tensor, DTensor):
        for axis, placement in enumerate(tensor.placements):
            if type(placement) is Shard:
                assert tensor.shape[placement.dim] % tensor.device_mesh.size(axis) == 0
                groups[placement.dim].append(tensor.device_mesh.get_group(axis))
            else:
                assert isinstance(placement, Replicate), placement
    return Sharding(tuple(tensor.shape), tuple(map(tuple, groups)))


def zeros_without(tensor: Tensor, dim: int, order: Sequence[int]) -> Tensor:
    """Zeros with the dimensions of `tensor` in this `order`, all but `dim`, spread as they are."""
    kept = [other for other in order if other != dim]
    part = local(tensor.detach())
    zeros = part.new_zeros([part.shape[other] for other in kept])
    if not isinstance(tensor, DTensor):
        return zeros
    placements = [
        Shard(kept.index(placement.dim))
        if isinstance(placement, Shard) and placement.dim != dim
        else Replicate()
        for placement in tensor.placements
    ]
    shape = torch.Size([tensor.shape[other] for other in kept])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        zeros, tensor.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )
