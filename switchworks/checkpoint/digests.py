"""A number for every tensor, and for every expert of a stack, that does not depend on the mesh.

It is the sum, modulo 2^64, of a hash of each element together with its position in the whole
tensor, so ranks that each hold a part add up to the digest of the whole. It finds accidents, not
forgeries: for those the manifest has a cryptographic hash of every file.
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
"""Elements hashed at once, so that temporaries fit a cache."""
_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""The constants of splitmix64 (Steele, Lea and Flood, 2014), as signed integers."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DigestPart(NamedTuple):
    """One rank's contribution to the digests of a tensor."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    begin: tuple[int, ...]
    """Index of the part's first element."""
    elements: int
    """Number of elements of the part."""
    sums: tuple[int, ...]
    """A sum for each expert of the part; for a tensor that is no stack, one."""


def digest_part(name: str, tensor: Tensor) -> DigestPart:
    """The contribution of this rank's part of `tensor`, all of it unless it is a DTensor."""
    shape, begin, part = tuple(tensor.shape), _begin(tensor), tensor.detach()
    if isinstance(part, DTensor):
        part = part.to_local()
    if not shape:
        shape, begin, part = (1,), (0,), part.reshape(1)
    sums = _row_sums(part, begin, shape)
    sums = sums if is_stack(name, shape) else sums.sum(dim=0, keepdim=True)
    return DigestPart(shape, begin, part.numel(), tuple(sums.tolist()))


def is_stack(name: str, shape: Sequence[int]) -> bool:
    """Whether the first dimension counts experts: tensors of modules named `experts`."""
    return "experts" in name.split(".") and len(shape) > 1


def combine_digests(ranks: Sequence[Mapping[str, DigestPart]]) -> dict[str, list[str]]:
    """Name -> a digest per expert, or one, from the parts of all ranks. Raises CheckpointError
    naming the tensor if ranks with the same part differ in it, or if no rank has some part of
    it."""
    return {name: _combine(name, [parts[name] for parts in ranks]) for name in ranks[0]}


def require_same(
    where: str, saved: Mapping[str, list[str]], loaded: Mapping[str, list[str]]
) -> None:
    """Raises CheckpointError naming the first tensor, and its experts, that is not as saved."""
    for name, digests in loaded.items():
        before = saved.get(name, [])
        wrong = [str(i) for i in range(len(digests)) if digests[i : i + 1] != before[i : i + 1]]
        if digests != before:
            experts = f"experts {', '.join(wrong[:8])} of " if len(digests) > 1 else ""
            raise CheckpointError(
                f"{where}: {experts}{name} came back other than it was saved.\n"
                "  Nothing that was read can be trusted: use another checkpoint."
            )


def _combine(name: str, parts: list[DigestPart]) -> list[str]:
    # Replicas have the same begin: they must agree, and count once.
    distinct = {part.begin: part for part in parts}
    if any(part != distinct[part.begin] for part in parts):
        raise CheckpointError(
            f"{name}: ranks that should hold the same part of it hold different numbers.\n"
            "  They have come apart in training; go on from an earlier checkpoint."
        )
    shape = parts[0].shape
    elements = sum(part.elements for part in distinct.values())
    if elements != math.prod(shape):
        raise CheckpointError(
            f"{name}: the ranks have {elements} of its {math.prod(shape)} numbers "
            "together.\n  A part is lost; go on from an earlier checkpoint."
        )
    totals = [0] * (shape[0] if is_stack(name, shape) else 1)
    for part in distinct.values():
        first = part.begin[0] if is_stack(name, shape) else 0
        for row, addend in enumerate(part.sums, start=first):
            totals[row] += addend
    return [f"{total % 2**64:016x}" for total in totals]


def _begin(tensor: Tensor) -> tuple[int, ...]:
    """Index of this rank's first element: shards are even, and no dimension is split twice."""
    begin = [0] * tensor.dim()
    if isinstance(tensor, DTensor):
        coordinate = tensor.device_mesh.get_coordinate()
        assert coordinate is not None
        part = tensor.to_local()
        for index, placement in zip(coordinate, tensor.placements, strict=True):
            if isinstance(placement, Shard):
                begin[placement.dim] = index * part.shape[placement.dim]
    return tuple(begin)


def _row_sums(part: Tensor, begin: Sequence[int], shape: Sequence[int]) -> Int64[Tensor, "R"]:
    """For each index of the first dimension the sum of hashes over the rest, modulo 2^64."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    # Positions, in the whole tensor laid out row by row, of the elements of the part's first row.
    row = torch.zeros((), dtype=torch.int64, device=part.device)
    for size, first, stride in list(zip(part.shape, begin, strides, strict=True))[1:]:
        positions = torch.arange(first, first + size, device=part.device) * stride
        row = row[..., None] + positions
    row = row.reshape(1, row.numel())
    # The elements' bits as integers: equal to the bit, NaN and -0.0 included.
    bits = part.contiguous().view(_BITS[part.element_size()]).reshape(len(part), row.shape[1])
    height = max(1, _BLOCK // max(1, row.shape[1]))
    sums = [
        _hash_sums(bits[top : top + height], row + (begin[0] + top) * strides[0], strides[0])
        for top in range(0, len(part), height)
    ]
    return torch.cat(sums) if sums else torch.zeros(0, dtype=torch.int64, device=part.device)


def _hash_sums(bits: Tensor, row: Tensor, stride: int) -> Tensor:
    """splitmix64 of each element, with its position as the generator's step, summed by row. Integer
    overflow wraps around, which is arithmetic modulo 2^64. Shifts of int64 bring in the sign bit
    where splitmix64 brings in zeros; that mixes as well."""
    positions = torch.arange(len(bits), device=bits.device)[:, None] * stride + (row + 1)
    mixed = positions.mul_(_STEP).add_(bits)
    mixed = (mixed ^ (mixed >> 30)).mul_(_FIRST)
    mixed = (mixed ^ (mixed >> 27)).mul_(_SECOND)
    return (mixed ^ (mixed >> 31)).sum(dim=1)
