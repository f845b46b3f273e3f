"""Products of the few rows that decoding has, on a processor in float32.

Such a product does little but read its matrix, and the library does that with one thread, and for
2 to 8 rows as slowly as for 32. As a batch of products, each with a share of the matrix's outputs,
it is read by all threads (experiments/speed.md).

Letters: N rows, I inputs, O outputs, B sequences, T positions, D model width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from switchworks.model import SwitchTransformer

FEW = 32
"""Rows up to which shares are faster."""
SHARES = 8
SMALL = 2**16
"""Weights below which a product is over before a second thread has begun."""


@contextmanager
def few_rows(model: SwitchTransformer) -> Iterator[None]:
    """While inside, the matrices of `model` multiply few rows in shares; numbers differ by the
    order of sums.

    Afterwards all is as before, also where another thread decodes at the same time.
    """
    changed: list[nn.Module] = []
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module) and _suits(module.weight):
            module.forward = partial(_forward, module)  # pyright: ignore[reportAttributeAccessIssue]
            changed.append(module)
    tied = model.head is None and "logits" not in vars(model) and _suits(model.embedding.weight)
    if tied:
        model.logits = partial(_logits, model)
    try:
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)  # gone already if two threads began at once
        if tied:
            vars(model).pop("logits", None)


def linear(x: Float[Tensor, "*b I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "*b O"]:
    """`F.linear`, in shares where there are few rows and no gradients."""
    rows = x.numel() // x.shape[-1]
    if not 0 < rows <= FEW or torch.is_grad_enabled():
        return F.linear(x, weight)
    columns = x.reshape(rows, -1).T
    shares = weight.view(SHARES, -1, weight.shape[1])
    answers = torch.bmm(shares, columns.expand(SHARES, *columns.shape)).view(-1, rows)
    return answers.T.contiguous().view(*x.shape[:-1], -1)


def _suits(weight: Tensor) -> bool:
    plain = not isinstance(weight, DTensor) and weight.is_contiguous()
    kind = weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and kind and weight.numel() >= SMALL and len(weight) % SHARES == 0


def _forward(module: nn.Linear, x: Float[Tensor, "*b I"]) -> Float[Tensor, "*b O"]:
    return linear(x, module.weight)


def _logits(model: SwitchTransformer, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
    return linear(x * model.config.d_model**-0.5, model.embedding.weight)
