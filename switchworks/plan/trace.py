"""Counts what one process does: bytes allocated, bytes sent, floating-point operations.

A simulated step and a real one are counted by the same rules.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from switchworks.optim import local
from switchworks.parallel import AXES, batch_axis

_COLLECTIVES = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
}
"""Operator -> collective, for `torch.distributed` and for its functional form."""
_ALLOCATORS = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"})
"""Operations that allocate memory and neither read nor write any."""
_BEFORE = 0
"""The number shared by all storages that are older than the trace."""


class Traffic(NamedTuple):
    """All calls of one collective over one axis, as this rank takes part in them."""

    collective: str
    axis: str
    """data, expert, model, batch (data and expert together) or world."""
    ranks: int
    span: int
    """Difference between the highest and the lowest rank: less than a node's size inside one."""
    calls: int
    bytes: int
    """The larger of input and output of this rank, over all calls."""

    @property
    def sent(self) -> float:
        """Bytes this rank sends: (n - 1) / n of `bytes`, twice for a sum (ring or pairwise)."""
        share = (self.ranks - 1) / self.ranks
        return (2 if self.collective == "all_reduce" else 1) * share * self.bytes


class Operation(NamedTuple):
    """The cost of one operation; equal ones are counted together."""

    flops: int
    bytes: int
    """Bytes read and written."""


class Trace(TorchDispatchMode):
    """Inside `with trace:` everything this process computes and sends is counted."""

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        super().__init__()
        self.operations: Counter[Operation] = Counter()
        self.phase = 0
        """Index of the phase that `peaks` assigns an allocation to; set by the caller."""
        self._axes = _axis_names(mesh)
        self._traffic: dict[tuple[str, str, int, int], list[int]] = {}
        self._live: dict[int, tuple[int, int]] = {}
        """Address of a storage -> its number and its bytes."""
        self._storages = 0
        self._events: list[tuple[int, int, int]] = []
        """(number of a storage, change in bytes, phase) in order."""
        self._gradients: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # A DTensor's operation comes here twice: first as such, then on this rank's shards, by
        # which time collectives have been put in. Only the second is counted.
        if any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        allocated = [self._track(tensor) for tensor in tensors_in(result)]
        if function.namespace in ("c10d", "_c10d_functional"):
            self._count_traffic(function, args, result)
        # What neither allocates nor writes in place is a view and costs nothing.
        elif any(allocated) or function._schema.is_mutable:
            self._count_operation(function, args, kwargs, result)
        return result

    def tracking_resizes(self) -> AbstractContextManager[object]:
        """Inside, storages that change their size are followed: FSDP resizes a gathered weight's to
        0 and back, for which torch has no hook."""
        original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            if storage._cdata in self._live:
                number, before = self._live[storage._cdata]
                self._live[storage._cdata] = (number, size)
                self._record(number, size - before)
            return result

        return patch.object(torch.UntypedStorage, "resize_", resize)

    @property
    def traffic(self) -> list[Traffic]:
        """The collectives called so far."""
        return [Traffic(*key, *counts) for key, counts in sorted(self._traffic.items())]

    def exclude(self, tensors: Iterable[Tensor]) -> None:
        """Leave the memory of `tensors`, allocated before the trace, out of the peaks."""
        for tensor in tensors:
            storage = local(tensor).untyped_storage()
            if storage._cdata not in self._live:
                self._add(storage, _BEFORE)

    def mark_gradients(self, tensors: Iterable[Tensor]) -> None:
        """Leave the memory of `tensors`, also while it held something else, out of the second
        result of `peaks`."""
        for tensor in tensors:
            address = local(tensor).untyped_storage()._cdata
            if address in self._live:
                self._gradients.add(self._live[address][0])

    def peaks(self, phases: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The most bytes allocated at once in each phase: with gradients, and without.

        The whole history is replayed at the end, because whether a storage holds a gradient is
        known only after it was allocated. A phase that begins below the level of the one before
        does not inherit its peak.
        """
        total = others = 0
        total_peaks, other_peaks = [0] * phases, [0] * phases
        for storage, change, phase in self._events:
            total += change
            others += 0 if storage in self._gradients else change
            total_peaks[phase] = max(total_peaks[phase], total)
            other_peaks[phase] = max(other_peaks[phase], others)
        return tuple(total_peaks), tuple(other_peaks)

    def _track(self, tensor: Tensor) -> bool:
        """Whether the memory of `tensor` is new; if so, record when it comes and goes."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._live:
            return False
        self._storages += 1
        self._record(self._storages, storage.nbytes())
        self._add(storage, self._storages)
        return True

    def _add(self, storage: torch.UntypedStorage, number: int) -> None:
        self._live[storage._cdata] = (number, storage.nbytes())
        # The Python object of a storage lives as long as its memory does.
        weakref.finalize(storage, self._free, storage._cdata).atexit = False

    def _free(self, address: int) -> None:
        number, size = self._live.pop(address)
        self._record(number, -size)

    def _record(self, number: int, change: int) -> None:
        if number != _BEFORE:
            self._events.append((number, change, self.phase))

    def _count_traffic(self, function: Any, args: tuple, result: Any) -> None:
        name = _COLLECTIVES.get(function._opname)
        if name is None:  # wait_tensor, barrier
            return
        ranks = torch.distributed.get_process_group_ranks(_process_group(args))
        axis = self._axes.get(tuple(ranks), "world")
        key = name, axis, len(ranks), max(ranks) - min(ranks)
        counts = self._traffic.setdefault(key, [0, 0])
        counts[0] += 1
        # torch.distributed passes (output, input), the functional form input and returns output.
        counts[1] += max(_bytes(args[0]), _bytes(args[1]), _bytes(result))

    def _count_operation(self, function: Any, args: tuple, kwargs: dict, result: Any) -> None:
        packet = function._overloadpacket
        if packet.__name__ in _ALLOCATORS:
            return
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            flops = 4 * args[0].numel() * args[1].shape[-2]  # torch has no formula for this one
        else:
            formula = flop_registry.get(packet)
            flops = 0 if formula is None else formula(*args, **kwargs, out_val=result)
        self.operations[Operation(int(flops), _bytes((args, kwargs)) + _bytes(result))] += 1


def _axis_names(mesh: DeviceMesh | None) -> Mapping[tuple[int, ...], str]:
    """The ranks of each of this rank's groups -> the name of the axis. If the data or the expert
    axis has one rank, the other's name stands for the batch axis too."""
    if mesh is None:
        return {}
    axes = {"batch": batch_axis(mesh)} | {axis: mesh[axis] for axis in AXES}
    return {
        tuple(torch.distributed.get_process_group_ranks(axis.get_group())): name
        for name, axis in axes.items()
        if axis.size() > 1
    }


def _process_group(args: tuple) -> ProcessGroup:
    """The group of a collective: functional ones name it last, others pass it before a ReduceOp."""
    if isinstance(args[-1], str):
        return distributed_c10d._resolve_process_group(args[-1])  # type: ignore[attr-defined]
    return ProcessGroup.unbox(next(arg for arg in args if isinstance(arg, torch.ScriptObject)))


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dictionaries: the arguments of an operation."""
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _bytes(values: Any) -> int:
    """Total size of the tensors in `values`; what `expand` repeats is counted once."""
    return sum(
        min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
        for tensor in tensors_in(values)
    )
