"""What one rank does in a step: bytes that are alive, bytes that travel, operations.

A `Trace` looks at every operation of torch while it is active, on real tensors and on fake ones
alike, so a simulated step and a real one are counted by the same rules.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

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
_HELD = 0
"""The number of all storages that were there before."""
_FREE = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"})
"""Operations that touch no memory although they allocate some."""


class Traffic(NamedTuple):
    """One kind of collective over one axis, as this rank takes part in it."""

    collective: str
    axis: str
    """data, expert, model, batch (data and expert together) or world."""
    ranks: int
    far: int
    """Distance from the first to the last of them."""
    calls: int
    bytes: int
    """The larger of what goes in and what comes out, over all calls."""

    @property
    def sent(self) -> float:
        """Bytes that leave the rank: (n - 1) / n of them, twice for a sum (a ring, or pairwise)."""
        share = (self.ranks - 1) / self.ranks
        return (2 if self.collective == "all_reduce" else 1) * share * self.bytes


class Work(NamedTuple):
    """Operations that are alike."""

    flops: int
    moved: int
    """Bytes read and written by one of them."""


class Trace(TorchDispatchMode):
    """Counts, from when it is entered, what this process does."""

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        super().__init__()
        self.axes = _names(mesh)
        self.work: Counter[Work] = Counter()
        self._traffic: dict[tuple[str, str, int, int], list[int]] = {}
        self._live: dict[int, tuple[int, int]] = {}
        """Address of a storage -> its number and its bytes."""
        self._numbers = 0
        self._events: list[tuple[int, int, int]] = []
        """(number of a storage, bytes more or less, phase), in order."""
        self.phase = 0
        """Peaks are found for each; whoever traces counts it up."""
        self._marked: set[int] = set()
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> "Trace":
        self._undo.enter_context(self._watching_resizes())
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._undo.close()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types):
            return NotImplemented  # it comes again, with this rank's part
        kwargs = kwargs or {}
        made = function(*args, **kwargs)
        new = [self._notice(tensor) for tensor in tensors_in(made)]
        if function.namespace in ("c10d", "_c10d_functional"):
            self._count_traffic(function, args, made)
        elif any(new) or function._schema.is_mutable:
            self._count_work(function, args, kwargs, made)
        return made

    @property
    def traffic(self) -> list[Traffic]:
        """What has travelled so far."""
        return [Traffic(*key, *counts) for key, counts in sorted(self._traffic.items())]

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Their memory was there before: a view of it is nothing new."""
        for tensor in tensors:
            storage = _local(tensor).untyped_storage()
            if storage._cdata in self._live:
                continue
            self._live[storage._cdata] = (_HELD, storage.nbytes())
            weakref.finalize(storage, self._forget, storage._cdata).atexit = False

    def mark(self, tensors: Iterable[Tensor]) -> None:
        """Their storages are gradients: `peaks` takes them out."""
        for tensor in tensors:
            found = self._live.get(_local(tensor).untyped_storage()._cdata)
            if found is not None:
                self._marked.add(found[0])

    def peaks(self, phases: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The most bytes allocated since the beginning that were alive at once in each phase: all
        of them, and all but what was ever marked."""
        total = rest = 0
        most, most_of_rest = [0] * phases, [0] * phases
        for number, change, phase in self._events:
            if number == _HELD:
                continue
            total += change
            rest += 0 if number in self._marked else change
            most[phase] = max(most[phase], total)
            most_of_rest[phase] = max(most_of_rest[phase], rest)
        return tuple(most), tuple(most_of_rest)

    def _notice(self, tensor: Tensor) -> bool:
        """True if the tensor's memory is new."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._live:
            return False
        self._numbers += 1
        self._live[address] = (self._numbers, storage.nbytes())
        self._events.append((self._numbers, storage.nbytes(), self.phase))
        weakref.finalize(storage, self._forget, address).atexit = False
        return True

    def _forget(self, address: int) -> None:
        number, size = self._live.pop(address)
        self._events.append((number, -size, self.phase))

    @contextlib.contextmanager
    def _watching_resizes(self) -> Iterator[None]:
        """FSDP frees what it gathered by making its storage empty."""
        plain = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            done = plain(storage, size)
            found = self._live.get(storage._cdata)
            if found is not None:
                number, before = found
                self._live[storage._cdata] = (number, size)
                self._events.append((number, size - before, self.phase))
            return done

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = plain  # type: ignore[method-assign]

    def _count_traffic(self, function: Any, args: tuple, made: Any) -> None:
        name = _COLLECTIVES.get(function._opname)
        if name is None:  # waiting and the like
            return
        group = next(group for arg in args if (group := _group(arg)) is not None)
        members = torch.distributed.get_process_group_ranks(group)
        axis = self.axes.get(tuple(members), "world")
        key = name, axis, len(members), max(members) - min(members)
        counts = self._traffic.setdefault(key, [0, 0])
        counts[0] += 1
        counts[1] += max(_bytes(args[0]), _bytes(args[1]), _bytes(made))

    def _count_work(self, function: Any, args: tuple, kwargs: dict, made: Any) -> None:
        packet = function._overloadpacket
        if packet.__name__ in _FREE:
            return
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            flops = 4 * args[0].numel() * args[1].shape[-2]  # torch has no formula for this one
        else:
            count = flop_registry.get(packet)
            flops = 0 if count is None else count(*args, **kwargs, out_val=made)
        self.work[Work(int(flops), _bytes((args, kwargs)) + _bytes(made))] += 1


def _names(mesh: DeviceMesh | None) -> Mapping[tuple[int, ...], str]:
    """The ranks of a group, this rank's own, -> their axis. Where expert ranks or data ranks alone
    make up the batch axis, it goes by their name."""
    if mesh is None:
        return {}
    axes = {"batch": batch_axis(mesh)} | {axis: mesh[axis] for axis in AXES}
    return {
        tuple(torch.distributed.get_process_group_ranks(axis.get_group())): name
        for name, axis in axes.items()
        if axis.size() > 1
    }


def _group(argument: Any) -> ProcessGroup | None:
    """The process group that an argument of a collective is or names."""
    if isinstance(argument, torch.ScriptObject):
        try:
            return ProcessGroup.unbox(argument)
        except RuntimeError:  # a reduction
            return None
    if isinstance(argument, str):
        try:
            return distributed_c10d._resolve_process_group(argument)  # type: ignore[attr-defined]
        except (RuntimeError, ValueError, LookupError):  # "sum"
            return None
    return None


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dictionaries: the arguments of an operation."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))


def _bytes(values: Any) -> int:
    """Of the tensors in `values`; what is repeated by `expand` is counted once."""
    return sum(
        min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
        for tensor in tensors_in(values)
    )
