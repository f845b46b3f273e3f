"""The sum of gradients over the ranks that saw different rows.

Each rank's loss is its share of the loss of the whole batch, so gradients are added and never
averaged: what a gradient is divided by does not depend on who computed which part of it. A weight
that the ranks keep whole is summed here; one that they keep in parts FSDP has summed already.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

_BUCKET = 2**23
"""Numbers that are summed in one go."""


class GradientSum:
    """Gradients of `model`: `groups` says between whom those that FSDP leaves alone are summed."""

    def __init__(self, model: nn.Module, groups: Mapping[str, ProcessGroup]) -> None:
        self.model = model
        self.groups = groups

    def expect(self, *, last: bool) -> None:
        """Call before each micro-batch: only with the last one gradients travel."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)

    @torch.no_grad()
    def finish(self, gradients: Mapping[str, Tensor]) -> None:
        """Call after the last micro-batch: `gradients`, by name, become those of the whole batch.

        All ranks have gradients of the same weights, since they all run the same layers, also
        where no token comes.
        """
        members: dict[ProcessGroup, list[Tensor]] = {}
        for name, group in self.groups.items():
            if name in gradients:
                members.setdefault(group, []).append(_local(gradients[name]))
        for group, tensors in members.items():
            for bucket in _buckets(tensors):
                _sum(bucket, group)


def _sum(tensors: list[Tensor], group: ProcessGroup) -> None:
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Tensors of one dtype, in their order, until there are enough numbers."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (
            bucket[0].dtype != tensor.dtype or sum(t.numel() for t in bucket) >= _BUCKET
        ):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
