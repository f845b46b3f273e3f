"""The norm of all gradients together: measured, bounded, and never hidden when it is not finite."""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

from switchworks.optim.sharded_stats import local, sharding_of


def global_norm(grads: Sequence[Tensor]) -> Float[Tensor, ""]:
    """The Euclidean norm of all `grads` taken as one vector, in at least float32.

    NaN or infinite if any number in them is, or if the squares of one tensor overflow. 0 without
    gradients. DTensors, on whatever meshes, count as the whole tensors they are parts of; then all
    ranks have to ask.
    """
    if not grads:
        return torch.zeros(())
    if any(isinstance(grad, DTensor) for grad in grads):
        return _norm_over_ranks(grads)
    dtype = torch.promote_types(torch.float32, grads[0].dtype)
    # Row by row first: on the CPU a float32 sum over millions of squares is off by 3e-5 and more,
    # by an amount that depends on how the numbers are spread over ranks.
    rows = [
        torch.linalg.vector_norm(grad, dim=-1, dtype=dtype) if grad.dim() > 1 else grad.to(dtype)
        for grad in grads
    ]
    return torch.nn.utils.get_total_norm(rows)


def _norm_over_ranks(grads: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Every rank adds its part's squares, divided by the number of ranks that have that part."""
    world = dist.get_world_size()
    holders: dict[int, list[Tensor]] = {}
    for grad in grads:
        parts = math.prod(len(dist.get_process_group_ranks(group)) for group in _groups(grad))
        holders.setdefault(world // parts, []).append(local(grad))
    shares = [global_norm(parts).square() / count for count, parts in holders.items()]
    total = torch.stack(shares).sum()
    dist.all_reduce(total)
    return total.sqrt()


def _groups(grad: Tensor) -> list[dist.ProcessGroup]:
    return [group for groups in sharding_of(grad).groups for group in groups]


def clip_coefficient(norm: float, max_norm: float | None) -> float:
    """What gradients of global norm `norm` are to be multiplied by to have one of `max_norm` at
    most: 1 if they have, if there is no bound, and if the norm is not finite."""
    if max_norm is None or not math.isfinite(norm) or norm <= max_norm:
        return 1.0
    return max_norm / norm


def first_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first of `tensors` that holds NaN or infinity; None if all are finite.

    Of a DTensor this rank's part is looked at.
    """
    return next((name for name, tensor in tensors if not local(tensor).isfinite().all()), None)
