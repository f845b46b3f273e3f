"""The sum of gradients over the ranks that saw different rows.

Each rank's loss is its share of the loss of the whole batch, so gradients are added, never
averaged: a gradient does not depend on which rank computed which part of it. Gradients of
replicated weights are summed here, those of weights under full shard by FSDP.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule

from switchworks.parallel.collectives import to_local

_BUCKET = 2**23
"""Numbers summed by one all-reduce."""


class GradientSum:
    """Sums the gradients of `model`: `groups` has the ranks to sum over for those weights, by name,
    that FSDP does not handle."""

    def __init__(self, model: nn.Module, groups: Mapping[str, ProcessGroup]) -> None:
        self.model = model
        self.groups = groups

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

    The order is that of the names, the same on every rank, so buckets match.
    """
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(member.numel() for member in bucket) >= _BUCKET
        if bucket and (full or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
