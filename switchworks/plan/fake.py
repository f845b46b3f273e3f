"""Fake ranks and fake tensors: one process goes through a step as any of thousands of ranks would.

torch provides both: a process group whose collectives return at once and move nothing, and
`FakeTensorMode`, in which a tensor has a shape, a dtype and a device and no values. Where the code
reads a value, this module gives one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from switchworks.parallel import SINGLE, MeshConfig, Ranks, build_mesh
from switchworks.plan.trace import tensors_in


@contextmanager
def fake_ranks(config: MeshConfig) -> Iterator[Ranks]:
    """The ranks of `config`: this process is rank 0 and the others do not exist.

    Collectives leave their outputs as they are, so only shapes mean anything inside.
    """
    if config.size == 1:
        yield SINGLE
        return
    assert not dist.is_initialized(), "a simulation needs a process of its own"
    dist.init_process_group("fake", rank=0, world_size=config.size, store=FakeStore())
    try:
        yield Ranks(build_mesh(config))
    finally:
        dist.destroy_process_group()
        # DTensor caches the placement of results by mesh, and a mesh equals any other over the
        # same ranks: the next one would get this one's, whose process groups are gone.
        _clear_sharding_prop_cache()


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Inside, new tensors have no values and take no memory. Every scalar read from one is 1."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with _untraced_propagation(), fake, _FakeScalars(), _FakeLists():
        yield


class _FakeScalars(TorchDispatchMode):
    """`item()` of a fake tensor is 1, or False for a condition, so loss and norms are finite.

    Operations on real tensors alone, which are the ranks of a mesh, are done for real.
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(tensors_in((args, kwargs)))
        if tensors and all(_is_real(tensor) for tensor in tensors):
            with _disable_current_modes():
                return function(*args, **kwargs)
        if function is torch.ops.aten._local_scalar_dense.default:
            if tensors[0].dtype == torch.bool:
                return False
            return 1.0 if tensors[0].dtype.is_floating_point else 1
        return function(*args, **kwargs)


class _FakeLists(TorchFunctionMode):
    """The same for `tolist()`, which no dispatch mode sees."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is Tensor.tolist and isinstance(args[0], FakeTensor) and args[0].dim() == 1:
            return [1.0 if args[0].dtype.is_floating_point else 1] * len(args[0])
        return function(*args, **(kwargs or {}))


def _is_real(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and not isinstance(tensor, FakeTensor) and not tensor.is_meta


@contextmanager
def _untraced_propagation() -> Iterator[None]:
    """DTensor infers shapes with tensors of the full size under whatever mode is active: a trace
    would take them for memory of this rank."""
    original = ShardingPropagator._propagate_tensor_meta_non_cached

    def untraced(self: ShardingPropagator, *arguments: Any) -> Any:
        with _disable_current_modes():
            return original(self, *arguments)

    ShardingPropagator._propagate_tensor_meta_non_cached = untraced  # type: ignore[method-assign]
    try:
        yield
    finally:
        ShardingPropagator._propagate_tensor_meta_non_cached = original  # type: ignore[method-assign]
