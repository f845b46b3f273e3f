"""One expert's weights out of a layer's stacks in safetensors files.

A stack is [E, ...] without gaps, so an expert is one run of bytes in each. It is read by `preadv`
into memory that is used again for the next expert. A memory map would count as resident whatever
it has touched; O_DIRECT was slower (docs/paging.md).
"""

import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from switchworks.checkpoint import Place
from switchworks.config import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What came from memory, and what from the disk."""

    hits: int = 0
    """Experts with tokens that were in memory."""
    misses: int = 0
    """Experts with tokens that were read."""
    bytes_read: int = 0
    seconds_waited: float = 0.0
    """By computation, for reads that had not ended."""

    @property
    def hit_rate(self) -> float:
        """Share of the experts with tokens that were in memory; 0 if there were none."""
        return self.hits / max(1, self.hits + self.misses)

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            hits=self.hits + other.hits,
            misses=self.misses + other.misses,
            bytes_read=self.bytes_read + other.bytes_read,
            seconds_waited=self.seconds_waited + other.seconds_waited,
        )


class OpenFile:
    """A file that several threads read at places of their own. It stays the same file if another is
    renamed over it, and is closed with the last reference."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)

    def read_into(self, target: Tensor, offset: int) -> None:
        """Fills `target`, contiguous, with the bytes from `offset` on. Raises CheckpointError if
        the file ends before, or cannot be read."""
        left: Any = target.detach().flatten().view(torch.uint8).numpy()
        while len(left):  # a call reads at most 2 GB
            try:
                count = os.preadv(self._descriptor, [left], offset)
            except OSError as error:
                raise self._unreadable(str(error)) from error
            if not count:
                raise self._unreadable(f"it ends at byte {offset:,}")
            left, offset = left[count:], offset + count

    def _unreadable(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}, whose experts are in use, cannot be read: {reason}.\n"
            "  Leave the file as it is while a model reads from it; load the model again."
        )


class StoredStacks:
    """The stacks of one layer's experts: parameter or buffer of the layer -> place of its stack."""

    def __init__(self, places: Mapping[str, Place], files: Mapping[Path, OpenFile]) -> None:
        self._places, self._files = places, files
        self.dtypes = {name: place.dtype for name, place in places.items()}
        self.num_experts = max(place.shape[0] for place in places.values())
        self.expert_bytes = sum(_expert_bytes(place) for place in places.values())
        """Bytes of one expert on disk."""

    def read(self, expert: int, unit: nn.Module) -> None:
        """Fills the tensors of `unit`, a module of that expert alone, converting their dtype."""
        for name, tensor in tensors_in(unit).items():
            place = self._places[name]
            same = tensor.dtype == place.dtype
            target = tensor if same else torch.empty(tensor.shape, dtype=place.dtype)
            offset = place.offset + expert * _expert_bytes(place)
            self._files[place.file].read_into(target, offset)
            if not same:
                tensor.detach().copy_(target)


def tensors_in(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _expert_bytes(place: Place) -> int:
    return torch.Size(place.shape[1:]).numel() * place.dtype.itemsize
