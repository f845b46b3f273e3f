"""A model for one device, spread over a mesh from outside; its weights become `DTensor`s.

In a fixed order: experts over the expert axis, widths over the model axis, the rest by FSDP2. A
model may be on the meta device meanwhile: then each rank allocates and draws its shards alone.
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
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from switchworks.model import SwitchTransformer, fill_shard
from switchworks.parallel.collectives import GradientSum
from switchworks.parallel.expert import all_to_all_dispatcher
from switchworks.parallel.layout import MeshConfig, WeightLayout, check_fit, weight_layouts
from switchworks.parallel.mesh import batch_axis
from switchworks.parallel.tensor import compute_with_shards, split_width

# It warns of in-place changes to what a block returns. There are none.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module")


def parallelize(
    model: SwitchTransformer,
    mesh: DeviceMesh,
    letters: Mapping[str, str],
    *,
    shard: bool = True,
    overlap: int = 1,
) -> GradientSum:
    """Spread `model`, which every rank holds whole, over `mesh`.

    `letters` are the dimensions of its weights by name. Afterwards the model is called as before,
    with this rank's rows; its losses are means over these, and the gradients of a step are those
    that the returned object leaves. Raises ConfigError if the two do not fit.
    """
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


@torch.no_grad()
def allocate_shards(model: nn.Module, device: torch.device | str) -> None:
    """Give every parameter of `model` that is on the meta device memory for this rank's shard."""
    for name, weight in list(model.named_parameters()):
        if weight.is_meta:
            owner, _, leaf = name.rpartition(".")
            shard = torch.empty_like(weight, device=device)
            parameter = nn.Parameter(shard, requires_grad=weight.requires_grad)
            model.get_submodule(owner).register_parameter(leaf, parameter)


@torch.no_grad()
def initialise_shards(model: SwitchTransformer, seed: int) -> dict[str, Tensor]:
    """Initialise every parameter of `model`, a shard of it where it is a `DTensor`. Returns the
    float32 values of those parameters that keep 16 bits of them, by name."""
    exact: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        shape, offset = tuple(weight.shape), (0,) * weight.dim()
        if isinstance(weight, DTensor):
            mesh, placements = weight.device_mesh, weight.placements
            shape, offset = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
        shard = torch.empty(shape)
        fill_shard(shard, name, model.config, seed, weight.shape, offset)
        values = _as_part(shard.to(weight.device), weight)
        weight.copy_(values)
        if weight.dtype in (torch.bfloat16, torch.float16):
            exact[name] = values
    return exact


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
    # Memory of its own, so that the whole is freed.
    shard = part.to_local().clone(memory_format=torch.contiguous_format)
    part = nn.Parameter(_as_part(shard, part), requires_grad=weight.requires_grad)
    module.register_parameter(leaf, part)


def _as_part(shard: Tensor, whole: Tensor) -> Tensor:
    """`shard` as this rank's part of a tensor that is split as `whole` is."""
    if not isinstance(whole, DTensor):
        return shard
    mesh, placements, stride = whole.device_mesh, whole.placements, whole.stride()
    return DTensor.from_local(
        shard, mesh, placements, run_check=False, shape=whole.shape, stride=stride
    )


def _share_experts(model: SwitchTransformer, mesh: DeviceMesh, config: MeshConfig) -> None:
    for layer in model.switch_layers.values():
        if config.expert > 1 or config.model > 1:
            compute_with_shards(layer.experts)
        if config.expert > 1:
            group = mesh.get_group("expert")
            layer.dispatcher = all_to_all_dispatcher(layer.dispatcher, group, config.overlap)


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
