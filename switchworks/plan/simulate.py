"""One training step of one rank, traced without data or devices: `explain --simulate`.

The code of training runs on the meta device over torch's fake process group, so what is counted is
what a run does. Where that code reads a value from a fake tensor, it is given one.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from switchworks.fast import attention, norm
from switchworks.optim import adafactor
from switchworks.parallel import SINGLE, MeshConfig, Ranks, build_mesh, check_fit
from switchworks.plan.footprint import Footprint, dummy_batch, measure_step
from switchworks.plan.trace import Operation, Traffic, tensors_in
from switchworks.training import Experiment, spread_model, state_of


def simulate(experiment: Experiment) -> Footprint:
    """What a step of `experiment` takes of one rank of its mesh. Two and three micro-batches are
    traced and larger numbers extrapolated, as all are alike. Without a capacity the load is taken
    to be even. Raises ConfigError if the model does not fit the mesh."""
    check_fit(experiment.model, experiment.mesh)
    with fake_ranks(experiment.mesh) as ranks:
        return simulate_on(ranks, experiment)


def simulate_with_depth(experiment: Experiment) -> Footprint:
    """`simulate` at a cost that does not grow with the depth of the model. Two and three of the
    model's periods (`routing.every` blocks of each stack) are traced and the others extrapolated.
    Counts are exact where blocks are alike, the peak is within some per cent."""
    model = experiment.model
    period = 1 if model.routing is None else model.routing.every
    periods = model.num_layers / period
    listed = model.routing is not None and (
        model.routing.encoder_blocks is not None or model.routing.decoder_blocks is not None
    )
    with fake_ranks(experiment.mesh) as ranks:
        if listed or periods <= 3 or model.num_decoder_layers not in (None, model.num_layers):
            return simulate_on(ranks, experiment)
        shallow = [
            replace(model, num_layers=count * period, num_decoder_layers=None) for count in (2, 3)
        ]
        two, three = (simulate_on(ranks, replace(experiment, model=model)) for model in shallow)
    return extrapolate(two, three, periods - 2)


def simulate_on(ranks: Ranks, experiment: Experiment) -> Footprint:
    """`simulate` on fake `ranks` that exist already."""
    experiment = _with_even_load(experiment)
    parts = experiment.micro_batches
    if parts <= 3:
        return trace_step(ranks, experiment)
    rows = experiment.batch_size // parts
    two, three = (
        trace_step(ranks, replace(experiment, micro_batches=count, batch_size=count * rows))
        for count in (2, 3)
    )
    return extrapolate(two, three, parts - 2)


def trace_step(ranks: Ranks, experiment: Experiment) -> Footprint:
    """Build a model without values on fake `ranks` and trace one step, every micro-batch of it."""
    # The kernels for CPUs read token counts on the host, which fake tensors do not have: on the
    # meta device those that suit any accelerator are put in. Splitting is free of cost there too.
    on_meta = copy.copy(ranks)
    on_meta.device = torch.device("meta")
    spread = spread_model(experiment, None, on_meta, empty=True)
    with fake_tensors(), _large_blocks():
        state = state_of(experiment, spread, ranks, empty=True)
        return measure_step(state, dummy_batch(experiment))


@contextmanager
def _large_blocks() -> Iterator[None]:
    """Inside, optimizer and norms compute on a tensor in one piece, and attention on 2^24 scores
    at a time: an accelerator has no cache to fit, and every block takes time to trace."""
    with (
        patch.object(adafactor, "_BLOCK", 2**62),
        patch.object(norm, "_BLOCK", 2**62),
        patch.object(attention, "BLOCK", 2**24),
    ):
        yield


def _with_even_load(experiment: Experiment) -> Experiment:
    """Without a capacity shapes depend on the tokens: every expert gets its share of them."""
    routing = experiment.model.routing
    if routing is None or routing.capacity_factor is not None or routing.expert_capacity:
        return experiment
    even = replace(routing, capacity_factor=1.0, min_capacity=1)
    return replace(experiment, model=replace(experiment.model, routing=even))


def extrapolate(first: Footprint, second: Footprint, steps: float) -> Footprint:
    """The footprint `steps` beyond `first` in the direction of `second`, which is one step away:
    every count is taken to be linear."""

    def at(a: float, b: float) -> int:
        return round(a + steps * (b - a))

    operations = Counter[Operation]()
    for operation in first.operations.keys() | second.operations.keys():
        operations[operation] = at(first.operations[operation], second.operations[operation])
    calls, more_calls = ({item[:4]: item[4:] for item in f.traffic} for f in (first, second))
    sizes = ("weights", "masters", "gradients", "optimizer")
    return Footprint(
        **{name: at(getattr(first, name), getattr(second, name)) for name in sizes},
        other_peaks=tuple(map(at, first.other_peaks, second.other_peaks)),
        transient_peaks=tuple(map(at, first.transient_peaks, second.transient_peaks)),
        operations=operations,
        traffic=tuple(
            Traffic(*key, *map(at, calls.get(key, (0, 0)), more_calls.get(key, (0, 0))))
            for key in sorted(calls.keys() | more_calls.keys())
        ),
    )


@contextmanager
def fake_ranks(config: MeshConfig) -> Iterator[Ranks]:
    """The ranks of `config`: this process is rank 0 and the others do not exist, so that
    collectives leave their outputs as they are."""
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
    """`item()` of a fake tensor is 1, or False for a condition, so loss and norms are finite. Of
    real tensors alone, which are the ranks of a mesh, operations are done for real."""

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


def _untraced_propagation() -> AbstractContextManager[object]:
    """DTensor infers shapes with tensors of the full size under whatever mode is active: a trace
    would take them for memory of this rank."""
    original = ShardingPropagator._propagate_tensor_meta_non_cached

    def untraced(self: ShardingPropagator, *arguments: Any) -> Any:
        with _disable_current_modes():
            return original(self, *arguments)

    return patch.object(ShardingPropagator, original.__name__, untraced)
