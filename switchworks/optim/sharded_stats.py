"""Means and whole matrices of tensors that are sharded over ranks.

The optimizer works on each rank's part as a plain tensor; a `DTensor` records which part it is.
What depends on all parts is computed here. For a tensor that is not sharded nothing is exchanged.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard


def local(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor`, in the same memory: all of it unless it is a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Sharding(NamedTuple):
    """How a tensor is sharded over ranks, evenly and in contiguous ranges."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    groups: tuple[tuple[ProcessGroup, ...], ...]
    """For each dimension the ranks that hold its parts: a group per axis of the mesh."""

    def move_to_end(self, dims: tuple[int, int] | None) -> "Sharding":
        """The sharding of `tensor.movedim(dims, (-2, -1))`; None: the same."""
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
        """The mean of `x` over its dimensions from `first` on, which are kept with size 1. `x` has
        the dimensions of this rank's part, or all but the last, over which each part has been
        averaged by the size of the whole."""
        dims = tuple(range(first, x.dim()))
        if not dims:
            return x
        if not any(self.groups):
            return x.mean(dim=dims, keepdim=True)
        total = x.sum(dim=dims, keepdim=True)
        for groups in self.groups[first:]:
            for group in groups:
                dist.all_reduce(total, group=group)
        return total.div_(math.prod(self.shape[first : x.dim()]))


def sharding_of(tensor: Tensor) -> Sharding:
    """How `tensor` is sharded; a plain tensor is not."""
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
    """Zeros with the dimensions of `tensor` in this `order` but for `dim`, sharded alike."""
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
    return _from_local(zeros, tensor, placements, shape)


def gather_matrix(part: Tensor, parameter: Tensor) -> Tensor:
    """The last two dimensions whole, of `part`, which is sharded as `parameter` is.

    An all-gather over the ranks that share a matrix. Of a stack each rank gets whole matrices of
    its own experts.
    """
    if not isinstance(parameter, DTensor):
        return part
    tensor = _from_local(part, parameter, parameter.placements, parameter.shape)
    return tensor.redistribute(placements=_whole_matrix(parameter)).to_local()


def take_shard(matrix: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of what `gather_matrix` gathered."""
    if not isinstance(parameter, DTensor):
        return matrix
    tensor = _from_local(matrix, parameter, _whole_matrix(parameter), parameter.shape)
    return tensor.redistribute(placements=parameter.placements).to_local()


def _whole_matrix(parameter: DTensor) -> list[Placement]:
    stacked = parameter.dim() == 3
    return [p if stacked and p == Shard(0) else Replicate() for p in parameter.placements]


def _from_local(
    part: Tensor, like: DTensor, placements: Sequence[Placement], shape: torch.Size
) -> DTensor:
    """A DTensor on the mesh of `like`, of whose `shape` this rank has `part`."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, like.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )
