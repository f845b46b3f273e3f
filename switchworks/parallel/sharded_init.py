"""Memory and initial values for a model that was built on the meta device and spread over a mesh.

Every rank allocates its shards and draws their values alone, those that the full parameters would
have there (`switchworks.model.fill_shard`). So one process and any mesh begin with the same values,
and a model may be larger than any host.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from switchworks.model import SwitchTransformer, fill_shard


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
    """Initialise every parameter of `model`, a shard of it where it is a `DTensor`.

    Returns the float32 values of those parameters that keep 16 bits of them, by name.
    """
    exact: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        shape, offset = tuple(weight.shape), (0,) * weight.dim()
        if isinstance(weight, DTensor):
            mesh, placements = weight.device_mesh, weight.placements
            shape, offset = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
        shard = torch.empty(shape)
        fill_shard(shard, name, model.config, seed, weight.shape, offset)
        values = _placed(shard.to(weight.device), weight)
        weight.copy_(values)
        if weight.dtype in (torch.bfloat16, torch.float16):
            exact[name] = values
    return exact


def _placed(shard: Tensor, weight: Tensor) -> Tensor:
    """`shard` as this rank's part of a tensor that is split as `weight` is."""
    if not isinstance(weight, DTensor):
        return shard
    return DTensor.from_local(
        shard,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
