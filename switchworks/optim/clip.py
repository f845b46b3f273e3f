"""The norm of all gradients together: measured, bounded, and never hidden when it is not finite."""

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def global_norm(grads: Sequence[Tensor]) -> Float[Tensor, ""]:
    """The Euclidean norm of all `grads` taken as one vector, in at least float32.

    NaN or infinite if any number in them is, or if the squares of one tensor overflow. 0 without
    gradients.
    """
    if not grads:
        return torch.zeros(())
    dtype = torch.promote_types(torch.float32, grads[0].dtype)
    # Row by row first: on the CPU a float32 sum over millions of squares is off by 3e-5 and more,
    # by an amount that depends on how the numbers are spread over ranks.
    rows = [
        torch.linalg.vector_norm(grad, dim=-1, dtype=dtype) if grad.dim() > 1 else grad.to(dtype)
        for grad in grads
    ]
    return torch.nn.utils.get_total_norm(rows)


def clip_by_global_norm(grads: Sequence[Tensor], max_norm: float) -> Float[Tensor, ""]:
    """Scale `grads` in place so that their global norm is at most `max_norm`.

    Returns the norm before. If it is not finite the gradients stay as they are, for the caller to
    look at: scaling by 0 or NaN would wipe out the trace. Waits for the device once.
    """
    norm = global_norm(grads)
    value = float(norm)
    if math.isfinite(value) and value > max_norm:
        torch._foreach_mul_(list(grads), max_norm / value)  # pyright: ignore[reportPrivateImportUsage]
    return norm


def first_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first of `tensors` that holds NaN or infinity; None if all are finite."""
    return next((name for name, tensor in tensors if not tensor.isfinite().all()), None)
