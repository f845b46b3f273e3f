"""A number for every tensor, and for every expert of a stack, that does not depend on the mesh.

A number of the tensor's elements and their positions is added up over all of them, so ranks that
each hold a part come to the same sum as one that holds the whole. What was saved on one mesh and
loaded on another is known to be the same, expert by expert. It finds accidents, not forgeries:
against those files have a cryptographic hash in the manifest.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from switchworks.config import CheckpointError

_BLOCK = 2**18
"""Elements looked at in one go, so that what is computed of them fits a cache."""
_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""The constants of splitmix64 (Steele, Lea and Flood, 2014), as signed numbers."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Part(NamedTuple):
    """What one rank knows of a tensor."""

    shape: tuple[int, ...]
    """Of the whole."""
    begin: tuple[int, ...]
    """Where the part begins, in each dimension."""
    elements: int
    """How many it has."""
    rows: tuple[int, ...]
    """A sum for each expert that it has a part of; for a tensor that is no stack, one."""


def part_of(name: str, tensor: Tensor) -> Part:
    """What this rank contributes to the digests of `tensor`, all of it unless it is a DTensor."""
    whole = tuple(tensor.shape)
    begin, part = _range(tensor), tensor.detach()
    if isinstance(part, DTensor):
        part = part.to_local()
    if not whole:
        whole, begin, part = (1,), (0,), part.reshape(1)
    sums = _row_sums(part, begin, whole)
    rows = sums if is_stack(name, whole) else sums.sum(dim=0, keepdim=True)
    return Part(whole, begin, part.numel(), tuple(rows.tolist()))


def parts_of(tensors: Mapping[str, Tensor]) -> dict[str, Part]:
    """That of each."""
    return {name: part_of(name, tensor) for name, tensor in tensors.items()}


def is_stack(name: str, shape: Sequence[int]) -> bool:
    """Whether the first dimension is that of the experts: what modules named `experts` hold."""
    return "experts" in name.split(".") and len(shape) > 1


def merged(ranks: Sequence[Mapping[str, Part]]) -> dict[str, list[str]]:
    """Name -> a digest per expert, or one, from what each rank has.

    Ranks may have the same part; then they have to agree. Raises CheckpointError naming the tensor
    if they do not, or if part of it is nowhere.
    """
    return {name: _merged(name, [parts[name] for parts in ranks]) for name in ranks[0]}


def require_same(
    where: str, saved: Mapping[str, list[str]], found: Mapping[str, list[str]]
) -> None:
    """Raises CheckpointError naming the first tensor, and its experts, that is not as saved."""
    for name, digests in found.items():
        if digests == saved.get(name):
            continue
        before = saved.get(name, [])
        wrong = [str(i) for i in range(len(digests)) if digests[i : i + 1] != before[i : i + 1]]
        experts = f"experts {', '.join(wrong[:8])} of " if len(digests) > 1 else ""
        raise CheckpointError(
            f"{where}: {experts}{name} came back other than it was saved.\n"
            "  Nothing that was read can be trusted: use another checkpoint."
        )


def _merged(name: str, parts: list[Part]) -> list[str]:
    different = {part.begin: part for part in parts}
    if any(part != different[part.begin] for part in parts):
        raise CheckpointError(
            f"{name}: ranks that should hold the same part of it hold different numbers.\n"
            "  They have come apart in training; go on from an earlier checkpoint."
        )
    shape = parts[0].shape
    found = sum(part.elements for part in different.values())
    if found != math.prod(shape):
        raise CheckpointError(
            f"{name}: the ranks have {found} of its {math.prod(shape)} numbers together."
        )
    sums = [0] * (shape[0] if is_stack(name, shape) else 1)
    for part in different.values():
        first = part.begin[0] if is_stack(name, shape) else 0
        for row, addend in enumerate(part.rows, start=first):
            sums[row] += addend
    return [f"{total % 2**64:016x}" for total in sums]


def _range(tensor: Tensor) -> tuple[int, ...]:
    """Where this rank's part begins: shards are even, and no dimension is split twice."""
    begin = [0] * tensor.dim()
    if isinstance(tensor, DTensor):
        coordinate = tensor.device_mesh.get_coordinate()
        assert coordinate is not None
        part = tensor.to_local()
        for place, placement in zip(coordinate, tensor.placements, strict=True):
            if isinstance(placement, Shard):
                begin[placement.dim] = place * part.shape[placement.dim]
    return tuple(begin)


def _row_sums(part: Tensor, begin: Sequence[int], whole: Sequence[int]) -> Int64[Tensor, "R"]:
    """For each index of the first dimension the sum over the rest, modulo 2^64."""
    strides = [math.prod(whole[dim + 1 :]) for dim in range(len(whole))]
    row = torch.zeros((), dtype=torch.int64, device=part.device)
    for size, first, stride in list(zip(part.shape, begin, strides, strict=True))[1:]:
        places = torch.arange(first, first + size, device=part.device) * stride
        row = row[..., None] + places
    row = row.reshape(1, row.numel())
    bits = part.contiguous().view(_BITS[part.element_size()]).reshape(len(part), row.shape[1])
    height = max(1, _BLOCK // max(1, row.shape[1]))
    sums = [
        _mixed(bits[top : top + height], row + (begin[0] + top) * strides[0], strides[0])
        for top in range(0, len(part), height)
    ]
    return torch.cat(sums) if sums else torch.zeros(0, dtype=torch.int64, device=part.device)


def _mixed(bits: Tensor, row: Tensor, stride: int) -> Tensor:
    """splitmix64 of each element, begun at its position, summed over each row."""
    places = torch.arange(len(bits), device=bits.device)[:, None] * stride + (row + 1)
    mixed = places.mul_(_STEP).add_(bits)
    mixed = (mixed ^ (mixed >> 30)).mul_(_FIRST)
    mixed = (mixed ^ (mixed >> 27)).mul_(_SECOND)
    return (mixed ^ (mixed >> 31)).sum(dim=1)
