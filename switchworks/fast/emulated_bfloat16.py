"""Products of bfloat16 without gradients, on a processor that has no instructions for them.

Such a processor multiplies them one by one: many rows 4 to 7 times as slowly as in float32, and
by a matrix whose inputs lie first, as an expert's, 10 to 150 times (experiments/speed.md). Widened
a piece at a time, so that the piece is still in the cache when it is multiplied, bfloat16 weights
are as fast as float32 ones or faster, since half of the bytes come from memory. What a product
gives is rounded to bfloat16 as before, and its sums are in float32.

Letters: N rows, I inputs, O outputs, C tokens of one expert, E experts, B sequences, H heads,
L query length, M key length, K head width, D model width.
"""

import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cache, partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from switchworks.fast import small_batch as few_rows
from switchworks.fast.instead import Replacement, instead
from switchworks.model import (
    AttentionBase,
    Experts,
    KeyValues,
    SwitchTransformer,
    activate,
    attend,
    join_heads,
)

PIECE = 2**20
"""Weights widened at once: 4 MB."""
NATIVE = 3
"""Rows up to which torch's own product by a matrix whose outputs lie first is the faster one."""
MANY = 256
"""Rows from which the matrix is the small part, and is widened as a whole."""


def in_float32(model: SwitchTransformer) -> AbstractContextManager[None]:
    """While inside, `model` multiplies bfloat16 in float32 where the processor cannot do it fast.

    Numbers differ by the order of sums before they are rounded. Gradients go the plain way.
    Afterwards all is as before, also where another thread decodes at the same time.
    """
    return instead(replacements(model))


@cache
def emulated() -> bool:
    """Whether bfloat16 is multiplied without vector instructions here: on x86 neither with AVX-512,
    which the library makes do with, nor with what was made for it. Others were not measured."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and torch.backends.cpu.get_cpu_capability() in ("AVX2", "DEFAULT")


def is_slow(x: Tensor) -> bool:
    """Whether products of `x` in its own dtype would be multiplied number by number."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and emulated()


def product(x: Float[Tensor, "*b I"], weight: Num[Tensor, "O I"]) -> Float[Tensor, "*b O"]:
    """`F.linear` in float32, rounded to the dtype of `x`; the weight may have any."""
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    if rows >= MANY:
        return F.linear(x.float(), weight.float()).to(x.dtype)
    columns = x.reshape(rows, inputs).float().T
    pieces = weight.split(max(1, PIECE // inputs))
    answers = [piece.float() @ columns for piece in pieces]  # O N: as the library is fastest
    answer = answers[0] if len(answers) == 1 else torch.cat(answers)
    return answer.T.to(x.dtype, memory_format=torch.contiguous_format).view(*x.shape[:-1], outputs)


def of_one_row(x: Float[Tensor, "1 I"], weight: Float[Tensor, "I O"]) -> Float[Tensor, "1 O"]:
    """`x @ weight` by the loop that torch has for sums of rows of a table, which widens bfloat16
    where it reads it: half of the time (experiments/speed.md). Each thread sums a share of the
    inputs; where there are several, their sums are rounded to bfloat16 before they are added."""
    inputs = len(weight)
    threads = min(torch.get_num_threads(), few_rows.SHARES)
    begins = torch.arange(0, inputs, -(-inputs // threads))
    rows = torch.arange(inputs)
    sums = F.embedding_bag(rows, weight, begins, mode="sum", per_sample_weights=x[0])
    return sums if len(sums) == 1 else sums.float().sum(dim=0, keepdim=True).to(x.dtype)


def replacements(model: SwitchTransformer) -> Iterator[Replacement]:
    """What `in_float32` does to `model`: modules, methods by name, and what takes their place."""
    if not emulated():
        return
    narrow = any(_suits(weight) for weight in model.parameters())  # with rounded matrices, norms
    for module in model.modules():
        if type(module) is nn.Linear and _suits(module.weight):
            yield module, "forward", partial(_linear, module.weight)
        elif type(module) is Experts and _suits(module.w_in):
            yield module, "feed_forward", partial(_feed_forward, module)
        elif isinstance(module, AttentionBase) and narrow:
            yield module, "attend_out", partial(_read, module)
    table = model.embedding.weight
    if model.head is None and _suits(table):
        yield model, "logits", partial(_logits, model)


def _suits(weight: Tensor) -> bool:
    kind = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return kind and not isinstance(weight, DTensor)


def _linear(weight: Tensor, x: Tensor) -> Tensor:
    native = x.numel() <= NATIVE * x.shape[-1] or torch.is_grad_enabled()
    return F.linear(x, weight) if native else product(x, weight)


def _logits(model: SwitchTransformer, x: Tensor) -> Tensor:
    return _linear(model.embedding.weight, x * model.config.d_model**-0.5)


def _feed_forward(
    module: Experts, x: Tensor, w_in: Tensor, w_gate: Tensor | None, w_out: Tensor
) -> Tensor:
    """Of the tokens of one expert, or of equally many of each."""
    if torch.is_grad_enabled():
        return Experts.feed_forward(module, x, w_in, w_gate, w_out)
    gate = None if w_gate is None else _by_expert(x, w_gate)
    hidden = activate(_by_expert(x, w_in), gate, module.activation)
    return _by_expert(hidden, w_out)


def _by_expert(x: Float[Tensor, "*E C I"], weight: Float[Tensor, "*E I O"]) -> Tensor:
    if weight.dim() == 3:
        return torch.stack([_by_expert(*one) for one in zip(x, weight, strict=True)])
    if len(x) == 1:
        return of_one_row(x, weight)
    wide = weight.float()
    if len(x) <= few_rows.FEW and len(wide) % few_rows.SHARES == 0:
        return few_rows.product(x.float(), wide).to(x.dtype)
    return (x.float() @ wide).to(x.dtype)


def _read(
    module: AttentionBase,
    query: Float[Tensor, "B H L K"],
    memory: KeyValues,
    bias: Float[Tensor, "#B #H #L M"] | None,
) -> Float[Tensor, "B L D"]:
    if torch.is_grad_enabled():
        return AttentionBase.attend_out(module, query, memory, bias)
    k, v = memory.k.float(), memory.v.float()
    heads = attend(query.float(), k, v, bias, module.dropout)
    return module.o(join_heads(heads).to(query.dtype))
