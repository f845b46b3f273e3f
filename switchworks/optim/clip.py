"""The norm of all gradients together, and clipping by it."""

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

    NaN or infinite if any element is, or if the squares of one tensor overflow. 0 without
    gradients. A DTensor, on any mesh, counts as the whole tensor; then all ranks must call this.
    """
    if not grads:
        return torch.zeros(())
    if any(isinstance(grad, DTensor) for grad in grads):
        return _norm_over_ranks(grads)
    dtype = torch.promote_types(torch.float32, grads[0].dtype)
    # Row by row first: on the CPU a float32 sum over millions of squares is off by 3e-5 and more,
    # by an amount that depends on how the elements are sharded over ranks.
    rows = [
        torch.linalg.vector_norm(grad, dim=-1, dtype=dtype) if grad.dim() > 1 else grad.to(dtype)
        for grad in grads
    ]
    return torch.nn.utils.get_total_norm(rows)


def _norm_over_ranks(grads: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Each rank's squares, divided by the number of ranks that hold the same part, and summed."""
    world = dist.get_world_size()
    by_copies: dict[int, list[Tensor]] = {}
    for grad in grads:
        groups = [group for groups in sharding_of(grad).groups for group in groups]
        parts = math.prod(len(dist.get_process_group_ranks(group)) for group in groups)
        by_copies.setdefault(world // parts, []).append(local(grad))
    squares = [global_norm(parts).square() / copies for copies, parts in by_copies.items()]
    total = torch.stack(squares).sum()
    dist.all_reduce(total)
    return total.sqrt()


def clip_coefficient(norm: float, max_norm: float | None) -> float:
    """The factor that brings gradients of global norm `norm` to at most `max_norm`.

    1 if they are within it, if `max_norm` is None, and if the norm is not finite.
    """
    if max_norm is None or not math.isfinite(norm) or norm <= max_norm:
        return 1.0
    return max_norm / norm


def first_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first of `tensors` that holds NaN or infinity; None if all are finite.

    Of a DTensor only this rank's part is checked.
    """
    return next((name for name, tensor in tensors if not local(tensor).isfinite().all()), None)
