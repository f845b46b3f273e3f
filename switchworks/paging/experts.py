"""The experts of a layer, of which some are in memory and the others on disk.

Each place in memory holds a module of one expert. It computes with the same operations, and has the
same seams, as the module of all experts in whose place this is, so no number depends on where an
expert was.

One rule serves the encoder, where nearly every expert of a layer has tokens, and decoding, where
few have. What is in memory is computed while the rest is read, in ascending order and as far ahead
as there is room. The least recently used expert makes room.

Letters: E experts, N tokens sorted by expert, D width, O width of the outputs.
"""

import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from switchworks.config import ConfigError
from switchworks.model import ExpertInput, Experts
from switchworks.paging.stacks import StoredStacks, Traffic, tensors_in
from switchworks.quantise import QuantisedModule


class _Read(NamedTuple):
    """An expert on its way into memory."""

    unit: Experts
    ended: "Future[None]"
    is_steady: bool
    """Into the place of another expert, and not into one that was empty."""


class PagedExperts(nn.Module):
    """All E experts of a layer, an `ExpertBank`, of which as many are in memory as there are
    `units`. For inference, on a CPU, and with the dtype it was loaded with."""

    def __init__(
        self,
        experts: Experts,
        units: Sequence[Experts],
        stacks: StoredStacks,
        readers: ThreadPoolExecutor,
        on_disk: Path,
    ) -> None:
        """`experts` are those this replaces, `units` modules of one expert each, without values;
        `on_disk` is the directory that holds the stacks, for messages."""
        super().__init__()
        self.num_experts, self.d_out, self.on_disk = experts.num_experts, experts.d_out, on_disk
        self.units = nn.ModuleList(units)
        self.cold, self.steady = Traffic(), Traffic()
        """Until every place in memory has been filled, and since."""
        self._stacks, self._readers = stacks, readers
        self._empty = list(units)
        self._cached: dict[int, Experts] = {}  # the least recently used first
        self._lock = Lock()  # threads of a server may decode with one model

    def forward(self, inputs: ExpertInput) -> Float[Tensor, "N O"]:
        """Each expert's outputs for its tokens, in the same order."""
        tokens, counts = inputs
        if torch.is_grad_enabled() and tokens.requires_grad:
            raise ConfigError(
                "Experts that are read from disk cannot be trained.\n  Load the model without a "
                "limit on the experts' memory, or compute under torch.no_grad()."
            )
        assert not isinstance(counts, Tensor), "counts on the device, without the kernel for them"
        sizes = [len(tokens) // self.num_experts] * self.num_experts if counts is None else counts
        used = [expert for expert, size in enumerate(sizes) if size]
        parts = dict(zip(used, tokens.split([sizes[expert] for expert in used]), strict=True))
        outputs = dict[int, Tensor]()
        if counts is None:  # of padded slots those without tokens hold zeros, which give zeros
            empty = [expert for expert, x in parts.items() if not x.any()]
            outputs = {expert: tokens.new_zeros(sizes[expert], self.d_out) for expert in empty}
            used = [expert for expert in used if expert not in outputs]
        with self._lock, closing(self._arriving(used)) as arriving:
            for expert, unit in arriving:
                count = None if counts is None else [sizes[expert]]
                outputs[expert] = unit(ExpertInput(parts[expert], count))
        if len(parts) == 1:
            return outputs.popitem()[1]
        return torch.cat([tokens.new_zeros(0, self.d_out), *(outputs[e] for e in parts)])

    def _arriving(self, used: Sequence[int]) -> Generator[tuple[int, Experts], None, None]:
        """Each expert of `used` with its module, which holds it until the next is asked for."""
        hits = [expert for expert in used if expert in self._cached]
        misses = deque(expert for expert in used if expert not in self._cached)
        pinned, reads = set(hits), dict[int, _Read]()
        self._count(is_steady=not self._empty, hits=len(hits))
        try:
            self._read_ahead(misses, pinned, reads)
            for expert in hits:
                self._cached[expert] = self._cached.pop(expert)  # the most recent from now on
                yield expert, self._cached[expert]
                pinned.remove(expert)
                self._read_ahead(misses, pinned, reads)
            while reads:
                expert = next(iter(reads))
                self._wait(reads[expert])
                self._cached[expert] = reads.pop(expert).unit
                yield expert, self._cached[expert]
                self._read_ahead(misses, pinned, reads)
        finally:  # after an error: what was to be overwritten holds no expert
            wait([read.ended for read in reads.values()])
            self._empty += [read.unit for read in reads.values()]

    def _read_ahead(self, misses: deque[int], pinned: set[int], reads: dict[int, _Read]) -> None:
        """Begins to read as many of `misses` as there is room for beside the `pinned`."""
        while misses:
            is_steady = not self._empty
            if is_steady:
                oldest = next((e for e in self._cached if e not in pinned), None)
                if oldest is None:
                    return
                unit = self._cached.pop(oldest)
                if isinstance(unit, QuantisedModule):
                    unit.weights_changed()
            else:
                unit = self._empty.pop()
            expert = misses.popleft()
            ended = self._readers.submit(self._stacks.read, expert, unit)
            reads[expert] = _Read(unit, ended, is_steady)

    def _wait(self, read: _Read) -> None:
        start = time.perf_counter()
        read.ended.result()
        seconds = time.perf_counter() - start
        size = self._stacks.expert_bytes
        self._count(is_steady=read.is_steady, misses=1, bytes_read=size, seconds_waited=seconds)

    def _count(self, *, is_steady: bool, **traffic: Any) -> None:
        if is_steady:
            self.steady += Traffic(**traffic)
        else:
            self.cold += Traffic(**traffic)

    def _apply(self, fn: Any, recurse: bool = True) -> "PagedExperts":
        """Raises ConfigError for another dtype or device: reads fill the tensors there are."""
        for tensor in tensors_in(self.units[0]).values():
            after = fn(tensor)
            if (after.dtype, after.device) != (tensor.dtype, tensor.device):
                raise ConfigError(
                    f"Experts that are read from disk stay in {tensor.dtype} on {tensor.device}.\n"
                    "  Say the dtype when the model is loaded."
                )
        return self
