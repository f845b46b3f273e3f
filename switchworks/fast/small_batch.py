"""Products of the few rows that decoding has, on a CPU in float32.

A product of few rows reads its matrix with one thread. As a batch of products, each with a share of
the outputs (of an expert's, whose inputs lie first: of its inputs, summed), all threads read it.

Letters: N rows, I inputs, O outputs, C tokens of one expert, S shares, D model width.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

from switchworks.fast.seams import Change, swapped, without_losses
from switchworks.model import (
    DISPATCHERS,
    ExpertBank,
    ExpertInput,
    Experts,
    Linear,
    RMSNorm,
    Routes,
    SwitchFFN,
    SwitchTransformer,
    normalise,
)

MAX_ROWS = 32
SHARES = 8
_LOCAL = DISPATCHERS["chosen"], DISPATCHERS["sorted"]
MIN_WEIGHTS = 2**16
"""Weights below which a product is over before a second thread has begun."""


def for_decoding(model: SwitchTransformer) -> AbstractContextManager[None]:
    """While inside, `model` computes no losses and no statistics, and multiplies few rows in
    shares; numbers differ by the order of sums."""
    return swapped((*without_losses(model), *small_batch(model)))


def small_batch(model: SwitchTransformer) -> Iterator[Change]:
    """The seams of `model` that multiply few rows in shares."""
    for module in model.modules():
        if type(module) is Linear and suits(module.weight):
            yield module, "matmul", linear
        elif type(module) is Experts and suits(module.w_in[0]) and suits(module.w_out[0]):
            yield module, "matmul", expert_matmul
        elif type(module) is RMSNorm and _is_plain(module.weight):
            yield module, "normalise", rms_norm
        elif isinstance(module, SwitchFFN) and module.dispatcher in _LOCAL:
            yield module, "dispatcher", dispatch_few
    if model.head is None and suits(model.embedding.weight):
        yield model, "matmul", linear


def linear(x: Float[Tensor, "*b I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "*b O"]:
    """`Linear.matmul`, in shares of the outputs if there are few rows."""
    return split_n_linear(x, weight) if _is_few(x) else F.linear(x, weight)


def expert_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """`Experts.matmul`, in shares of the inputs for few rows of one expert."""
    return split_k_matmul(x, weight) if x.dim() == 2 and _is_few(x) else x @ weight


def rms_norm(
    x: Float[Tensor, "*b D"], weight: Float[Tensor, "D"], epsilon: float
) -> Float[Tensor, "*b D"]:
    """`RMSNorm.normalise`, whose mean alone takes as long as these five operations."""
    if not _is_few(x):
        return normalise(x, weight, epsilon)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.addcmul(_as_tensor(epsilon), length, length, value=1 / x.shape[-1]).rsqrt_()
    return (x * scale).mul_(weight)


def split_n_linear(x: Float[Tensor, "*b I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "*b O"]:
    """`F.linear` of few rows by shares of the outputs. No gradients."""
    inputs = weight.shape[1]
    rows = x.numel() // inputs
    # The same columns for every share: a stride of 0, so that nothing is copied.
    columns = x.contiguous().as_strided((SHARES, inputs, rows), (0, 1, inputs))
    outputs = torch.bmm(weight.detach().view(SHARES, -1, inputs), columns)  # S O/S N
    if rows > 1:
        outputs = outputs.view(-1, rows).T.contiguous()
    return outputs.view(*x.shape[:-1], -1)


def split_k_matmul(x: Float[Tensor, "C I"], weight: Float[Tensor, "I O"]) -> Float[Tensor, "C O"]:
    """`x @ weight` of few rows, by shares of the inputs. No gradients."""
    rows, inputs = x.shape
    part = inputs // SHARES
    strips = x.contiguous().as_strided((SHARES, rows, part), (part, inputs, 1))
    return torch.bmm(strips, weight.view(SHARES, part, -1)).sum(dim=0)


def dispatch_few(
    x: Float[Tensor, "G S D"], routes: Routes, experts: ExpertBank, capacity: int | None
) -> Float[Tensor, "G S O"]:
    """`SwitchFFN.dispatcher`; of a single token, as decoding one text has them, without a sort."""
    if x.shape[:2] != (1, 1) or routes.token is not None:
        return DISPATCHERS["chosen"](x, routes, experts, capacity)
    kept = int(routes.kept)
    counts = [0] * experts.num_experts
    counts[int(routes.expert)] = kept
    outputs = experts(ExpertInput(x[0, :kept], counts)) * routes.gate[:, :kept].mT.to(x.dtype)
    return F.pad(outputs, (0, 0, 0, 1 - kept))[None]  # 0 for padding


def suits(weight: Tensor) -> bool:
    """Whether shares of this matrix are faster, for few rows."""
    whole = weight.is_contiguous() and weight.shape[0] % SHARES == 0
    return _is_plain(weight) and whole and weight.numel() >= MIN_WEIGHTS


def _is_plain(weight: Tensor) -> bool:
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    return on_cpu and not isinstance(weight, DTensor)


def _is_few(x: Tensor) -> bool:
    return 0 < x.numel() <= MAX_ROWS * x.shape[-1] and not torch.is_grad_enabled()


_as_tensor = cache(lambda number: torch.tensor([number]))
