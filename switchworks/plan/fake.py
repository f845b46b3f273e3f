"""Ranks that are not there, and tensors that hold no numbers, so that one process can go through
what any of thousands would do.

torch has both: a process group whose collectives do nothing, and `FakeTensorMode`, in which a
tensor is its shape, dtype and device. What the code asks of a number is answered here.
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
    """The ranks of `config`, of which this process is the first and the others do not exist."""
    if config.size == 1:
        yield SINGLE
        return
    assert not dist.is_initialized(), "a simulation needs a process of its own"
    dist.init_process_group("fake", rank=0, world_size=config.size, store=FakeStore())
    try:
        yield Ranks(build_mesh(config))
    finally:
        dist.destroy_process_group()
        # DTensor caches the placement of results by mesh, and meshes of equal ranks compare equal:
        # the next one would be handed this one, whose process groups are gone.
        _clear_sharding_prop_cache()


@contextmanager
def no_numbers() -> Iterator[None]:
    """Inside, tensors that are made have no values and take no memory."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with _hidden_propagation(), fake, _Answers(), _Lists():
        yield


class _Answers(TorchDispatchMode):
    """Any number that is asked of a fake tensor is 1, and a condition is false. Real integers,
    which say who is where on a mesh, stay what they are."""

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


class _Lists(TorchFunctionMode):
    """The same answer for all numbers of a tensor at once."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is Tensor.tolist and isinstance(args[0], FakeTensor) and args[0].dim() == 1:
            return [1.0 if args[0].dtype.is_floating_point else 1] * len(args[0])
        return function(*args, **(kwargs or {}))


def _is_real(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and not isinstance(tensor, FakeTensor) and not tensor.is_meta


@contextmanager
def _hidden_propagation() -> Iterator[None]:
    """DTensor finds out shapes by tensors of the whole's size, in the mode that is active: they
    would be taken for memory of this rank."""
    plain = ShardingPropagator._propagate_tensor_meta_non_cached

    def hidden(self: ShardingPropagator, *arguments: Any) -> Any:
        with _disable_current_modes():
            return plain(self, *arguments)

    ShardingPropagator._propagate_tensor_meta_non_cached = hidden  # type: ignore[method-assign]
    try:
        yield
    finally:
        ShardingPropagator._propagate_tensor_meta_non_cached = plain  # type: ignore[method-assign]
