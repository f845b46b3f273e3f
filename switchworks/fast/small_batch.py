"""The few rows that decoding has, on a processor in float32.

A product of few rows does little but read its matrix, and the library does that with one thread,
and for 2 to 8 rows as slowly as for 32. As a batch of products, each with a share of the matrix's
outputs (of an expert's, whose inputs lie first: of its inputs, summed) it is read by all threads.
Beside such products every small operation counts: norms take five of them in place of eight, and
queries, keys and values of narrow models come of one product (experiments/speed.md).

Letters: N rows, I inputs, O outputs, C tokens of one expert, S shares, P outputs of a share,
D model width.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from switchworks.fast.instead import Replacement, instead
from switchworks.model import Attention, Experts, KeyValues, RMSNorm, SwitchTransformer, activate

FEW = 32
"""Rows up to which shares are faster."""
SHARES = 8
SMALL = 2**16
"""Weights below which a product is over before a second thread has begun."""
JOINED = 2**18
"""Weights of a query matrix up to which it is copied beside those of keys and values: the time is
won back by the fifth token, the bytes are few."""


def few_rows(model: SwitchTransformer) -> AbstractContextManager[None]:
    """While inside, the matrices of `model` multiply few rows in shares; numbers differ by the
    order of sums.

    Afterwards all is as before, also where another thread decodes at the same time.
    """
    return instead(replacements(model))


def split_n_linear(
    x: Float[Tensor, "*b I"], shares: Float[Tensor, "S P I"]
) -> Float[Tensor, "*b O"]:
    """`F.linear` of few rows with a matrix whose outputs are in shares. No gradients."""
    count, _, inputs = shares.shape
    rows = x.numel() // inputs
    columns = x.contiguous().as_strided((count, inputs, rows), (0, 1, inputs))
    answers = torch.bmm(shares, columns)  # S P N
    if rows > 1:
        answers = answers.view(-1, rows).T.contiguous()
    return answers.view(*x.shape[:-1], -1)


def product(x: Float[Tensor, "C I"], weight: Float[Tensor, "I O"]) -> Float[Tensor, "C O"]:
    """`x @ weight` of few rows, in shares of the inputs. No gradients."""
    rows, inputs = x.shape
    part = inputs // SHARES
    strips = x.contiguous().as_strided((SHARES, rows, part), (part, inputs, 1))
    return torch.bmm(strips, weight.view(SHARES, part, -1)).sum(dim=0)


def rms_norm(
    x: Float[Tensor, "*b D"], weight: Float[Tensor, "D"], epsilon: Float[Tensor, "1"]
) -> Float[Tensor, "*b D"]:
    """`RMSNorm`, whose mean alone takes as long as these five operations. No gradients."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.addcmul(epsilon, length, length, value=1 / x.shape[-1]).rsqrt_()
    return (x * scale).mul_(weight)


def replacements(model: SwitchTransformer) -> Iterator[Replacement]:
    """What `few_rows` does to `model`: modules, methods by name, and what takes their place."""
    for module in model.modules():
        if type(module) is nn.Linear and _suits(module.weight):
            yield module, "forward", partial(_linear, module.weight, _shares(module.weight))
        elif type(module) is Experts and _suits(module.w_in[0]) and _suits(module.w_out[0]):
            yield module, "one", partial(_expert, module)
        elif type(module) is RMSNorm and _plain(module.weight):
            epsilon = module.weight.new_tensor([module.epsilon])
            yield module, "forward", partial(_norm, module, epsilon)
    for block in model.decoder:
        attention = block.self_attention
        if isinstance(attention, Attention) and (joined := _joined(attention)) is not None:
            yield attention, "qkv", partial(_ask, attention, joined)
    table = model.embedding.weight
    if model.head is None and _suits(table):
        yield model, "logits", partial(_logits, model, _shares(table))


def _plain(weight: Tensor) -> bool:
    kind = weight.device.type == "cpu" and weight.dtype == torch.float32
    return kind and not isinstance(weight, DTensor)


def _suits(weight: Tensor) -> bool:
    whole = weight.is_contiguous() and weight.shape[0] % SHARES == 0
    return _plain(weight) and whole and weight.numel() >= SMALL


def _shares(weight: Float[Tensor, "O I"]) -> Float[Tensor, "S P I"]:
    return weight.detach().view(SHARES, -1, weight.shape[1])


def _few(x: Tensor) -> bool:
    return 0 < x.numel() <= FEW * x.shape[-1] and not torch.is_grad_enabled()


def _linear(weight: Tensor, shares: Tensor, x: Tensor) -> Tensor:
    return split_n_linear(x, shares) if _few(x) else F.linear(x, weight)


def _joined(attention: Attention) -> Float[Tensor, "S P I"] | None:
    """Its matrices for queries, keys and values as one, in shares; None if they do not suit."""
    parts = [attention.q, attention.k, attention.v]
    if not all(type(part) is nn.Linear and _suits(part.weight) for part in parts):
        return None
    if attention.q.weight.numel() > JOINED:
        return None
    return _shares(torch.cat([part.weight.detach() for part in parts]))


def _ask(
    attention: Attention, joined: Tensor, x: Tensor, real: Tensor | None = None
) -> tuple[Tensor, KeyValues, None]:
    if x.shape[1] != 1 or not _few(x):
        return Attention.qkv(attention, x, real)
    three = split_n_linear(x, joined).view(len(x), 3, attention.num_heads, 1, -1)
    q, k, v = three.unbind(dim=1)
    return q, KeyValues(k, v), None


def _expert(module: Experts, expert: int, x: Tensor) -> Tensor:
    if not _few(x):
        return Experts.one(module, expert, x)
    gate = None if module.w_gate is None else product(x, module.w_gate[expert])
    hidden = activate(product(x, module.w_in[expert]), gate, module.activation)
    return product(hidden, module.w_out[expert])


def _norm(module: RMSNorm, epsilon: Tensor, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, epsilon) if _few(x) else RMSNorm.forward(module, x)


def _logits(model: SwitchTransformer, shares: Tensor, x: Tensor) -> Tensor:
    return _linear(model.embedding.weight, shares, x * model.config.d_model**-0.5)
