"""A model for one device, spread over a mesh from outside.

In a fixed order: experts over the expert axis, widths over the model axis, and what is left of
each weight over the ranks that see different rows (FSDP2). The model's code does not change; its
weights become `DTensor`s with the names and shapes they had.
"""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from switchworks.model import SwitchTransformer
from switchworks.parallel.config import MeshConfig
from switchworks.parallel.expert import AllToAllDispatcher
from switchworks.parallel.gradients import GradientSum
from switchworks.parallel.layout import WeightLayout, check_fit, weight_layouts
from switchworks.parallel.mesh import batch_axis
from switchworks.parallel.tensor import compute_with_shards, split_width

# It warns of in-place changes to what a block returns. There are none.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module")


def parallelize(
    model: SwitchTransformer,
    mesh: DeviceMesh | None,
    letters: Mapping[str, str],
    *,
    shard: bool = True,
    overlap: int = 1,
) -> GradientSum:
    """Spread `model`, which every rank holds whole, over `mesh`; None leaves it alone.

    `letters` are the dimensions of its weights by name. Afterwards the model is called as before,
    with this rank's rows; its losses are means over these, and the gradients of a step are those
    that the returned object leaves. Raises ConfigError if the two do not fit.
    """
    if mesh is None:
        return GradientSum(model, {})
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))
    config = MeshConfig(**sizes, shard=shard, overlap=overlap)
    check_fit(model.config, config)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    where = weight_layouts(letters, shapes, config)
    for name, place in where.items():
        _split_weight(model, name, place, mesh)
    _share_experts(model, mesh, config)
    if config.model > 1:
        split_width(model, mesh.get_group("model"))
    by_hand = {name for name, place in where.items() if place.data is None}
    if shard and config.batch > 1:
        _shard_fully(model, where, mesh)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    axes = {name: "data" if where[name].stacked else "batch" for name in by_hand & trained}
    meshes = {"data": mesh["data"], "batch": batch_axis(mesh)}
    groups = {n: meshes[axis].get_group() for n, axis in axes.items() if meshes[axis].size() > 1}
    return GradientSum(model, dict(sorted(groups.items())))


def shard_like(weight: Tensor, placed: Tensor) -> Tensor:
    """This rank's part of `weight`, a whole tensor, in the places of `placed`."""
    if not isinstance(placed, DTensor):
        return weight
    mesh, placements = placed.device_mesh, placed.placements
    return distribute_tensor(weight, mesh, placements, src_data_rank=None)


def gather_full(weight: Tensor) -> Tensor:
    """All of `weight`, of which every rank has a part. To be called by all of them."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _split_weight(model: nn.Module, name: str, place: WeightLayout, mesh: DeviceMesh) -> None:
    """Over the expert and the model axis."""
    axes = {"expert": place.expert, "model": place.model}
    axes = {axis: dim for axis, dim in axes.items() if dim is not None}
    if not axes:
        return
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    weight = getattr(module, leaf)
    placements = [Shard(dim) for dim in axes.values()]
    part = distribute_tensor(weight.detach(), mesh[tuple(axes)], placements, src_data_rank=None)
    part = nn.Parameter(_tight(part), requires_grad=weight.requires_grad)
    module.register_parameter(leaf, part)


def _tight(part: DTensor) -> DTensor:
    """`part` with memory of its own, so that the whole is freed."""
    own = part.to_local().clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        own,
        part.device_mesh,
        part.placements,
        run_check=False,
        shape=part.shape,
        stride=part.stride(),
    )


def _share_experts(model: SwitchTransformer, mesh: DeviceMesh, config: MeshConfig) -> None:
    for layer in model.switch_layers.values():
        if config.expert > 1 or config.model > 1:
            compute_with_shards(layer.experts)
        if config.expert > 1:
            group = mesh.get_group("expert")
            layer.dispatcher = AllToAllDispatcher(layer.dispatcher, group, config.overlap)


def _shard_fully(
    model: SwitchTransformer, where: Mapping[str, WeightLayout], mesh: DeviceMesh
) -> None:
    """FSDP2: a block's weights are gathered when it is computed, and so are the rest, at the root.

    Weights are grouped by when they are needed: cross-attention's keys and values are projected
    before their block runs. Routers keep float32 in a model of 16 bits, and a group has one dtype.
    """
    dims = {weight: where[name].data for name, weight in model.named_parameters()}
    options = {
        "shard_placement_fn": lambda weight: Shard(dims[weight]),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)
        if any(weight.dtype == torch.bfloat16 for weight in dims)
        else MixedPrecisionPolicy(),
        "ignored_params": {weight for weight, dim in dims.items() if dim is None},
    }
    batch = batch_axis(mesh)
    for layer in model.switch_layers.values():
        _shard([layer.experts], mesh["data"], options)
        _shard([layer.router], batch, options)
    for stack in (model.encoder, model.decoder):
        for block in stack or ():
            cross = block.cross_attention
            if cross is not None:
                _shard([cross.k, cross.v], batch, options)
            _shard([block], batch, options)
    fully_shard(model, mesh=batch, **options)
    for method in ("encode", "init_cache", "prefill", "decode_step"):
        register_fsdp_forward_method(model, method)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Added, not averaged: the losses are shares already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _shard(modules: list[nn.Module], mesh: DeviceMesh, options: dict) -> None:
    """One group of weights, unless all of them are kept whole."""
    weights = {weight for module in modules for weight in module.parameters()}
    if weights - options["ignored_params"]:
        fully_shard(modules, mesh=mesh, **options)
