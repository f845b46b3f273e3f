"""What decoding computes in other ways, on a CPU: few rows, and one query of each text.

In float32 a product of one row reads its matrix with one thread. As a batch of products, each with
a share of the outputs (of an expert's, whose inputs lie first: of its inputs, summed), all threads
read it. Other products are with copies of the weights (`packed.py`). One query is attended for by
plain products: torch's fused kernel is made for many.

Letters: N rows, I inputs, O outputs, C tokens of one expert, S shares, D model width, B texts,
H heads, M keys, K head width.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from switchworks.fast.packed import PackedExpert, PackedWeights, can_pack, run_packed, store_of
from switchworks.fast.seams import Change, swapped, without_losses
from switchworks.model import (
    DISPATCHERS,
    AttentionBase,
    ExpertBank,
    ExpertInput,
    Experts,
    Linear,
    RMSNorm,
    Routes,
    SharedDropout,
    SwitchFFN,
    SwitchTransformer,
    attend,
    normalise,
    to_float32,
)

MAX_ROWS = 32
SHARES = 8
_LOCAL = DISPATCHERS["chosen"], DISPATCHERS["sorted"]
MIN_WEIGHTS = 2**16
"""Weights below which a product is over before a second thread has begun."""
FEW_KEYS = 2**17
"""Numbers in keys up to which the fused kernel is as fast, in float32."""


def for_decoding(model: SwitchTransformer) -> AbstractContextManager[None]:
    """While inside, `model` computes no losses and no statistics, and products and attention as
    is best for decoding; numbers differ by the order of sums. Weights must not change meanwhile."""
    return swapped((*without_losses(model), *small_batch(model)))


def small_batch(model: SwitchTransformer) -> Iterator[Change]:
    """The seams of `model` that `for_decoding` sets beside those of losses."""
    store, banks = _store(model), _banks(model)
    for module in model.modules():
        if type(module) is Linear and _is_faster(module.weight):
            yield module, "matmul", store.seam(linear)
        elif type(module) is Experts and all(map(_is_faster, module.parameters())):
            yield module, "matmul", expert_matmul
            packs = store.packs_experts and module in banks
            if packs and all(map(can_pack, module.parameters())):
                yield module, "run", store.seam(run_packed)
        elif type(module) is RMSNorm and _is_on_cpu(module.weight) and module.weight.itemsize <= 4:
            yield module, "normalise", rms_norm
        elif isinstance(module, SwitchFFN) and module.dispatcher in _LOCAL:
            yield module, "dispatcher", dispatch_few
    if model.head is None and _is_faster(model.embedding.weight):
        yield model, "matmul", store.seam(linear)
    for module in model.decoder.modules():
        if isinstance(module, AttentionBase) and _is_on_cpu(model.embedding.weight):
            yield module, "attend", attend_query


def _store(model: SwitchTransformer) -> PackedWeights:
    """That of the context that `model` is in already, or a new one."""
    seams = [m.matmul for m in (*model.modules(), model) if isinstance(m, Linear | type(model))]
    in_use = next(filter(None, map(store_of, seams)), None)
    return in_use or PackedWeights(
        sum(weight.nbytes for bank in _banks(model) for weight in bank.parameters())
    )


def _banks(model: SwitchTransformer) -> set[nn.Module]:
    """The experts of all layers. Not those of one expert in which others are read from disk: a copy
    would be of whichever was there."""
    return {
        layer.experts for layer in model.switch_layers.values() if type(layer.experts) is Experts
    }


def _is_faster(weight: Tensor) -> bool:
    """Whether products with this weight, or with the matrices in it, are faster in other ways."""
    return can_pack(weight) or suits(weight if weight.dim() == 2 else weight[0])


def linear(
    store: PackedWeights, x: Float[Tensor, "*b I"], weight: Float[Tensor, "O I"]
) -> Float[Tensor, "*b O"]:
    """`Linear.matmul`: of one row in float32 in shares of the outputs, else with a copy."""
    if torch.is_grad_enabled() or not x.numel():
        return F.linear(x, weight)
    is_single = x.numel() == x.shape[-1] or not can_pack(weight)
    if is_single and suits(weight) and _is_few(x):
        return split_n_linear(x, weight)
    return store.multiply(x, weight) if can_pack(weight) else F.linear(x, weight)


def expert_matmul(x: Tensor, weight: Tensor | PackedExpert) -> Tensor:
    """`Experts.matmul`: of one row in float32 in shares of the inputs, else with a copy if there is
    one."""
    if isinstance(weight, PackedExpert):
        if len(x) > 1 or not suits(weight.plain):
            return weight.multiply(x)
        weight = weight.plain
    few = x.dim() == 2 and _is_few(x) and suits(weight)
    return split_k_matmul(x, weight) if few else x @ weight


def attend_query(
    q: Float[Tensor, "B H L K"],
    k: Float[Tensor, "B H M K"],
    v: Float[Tensor, "B H M K"],
    bias: Float[Tensor, "#B #H #L M"] | None,
    dropout: SharedDropout,
) -> Float[Tensor, "B H L K"]:
    """`attend`, of a single query by plain products. Few keys of 16 bits are made wider: a kernel
    in float32 takes less than making products of them would."""
    if q.shape[2] != 1 or torch.is_grad_enabled():
        return attend(q, k, v, bias, dropout)
    if k.numel() <= FEW_KEYS:
        q_wide, k_wide, v_wide = (to_float32(part) for part in (q, k, v))
        return attend(q_wide, k_wide, v_wide, bias, dropout).to(q.dtype)
    scores = to_float32(q @ k.mT)
    scores = scores if bias is None else scores + bias
    return scores.softmax(dim=-1).to(v.dtype) @ v


def rms_norm(
    x: Float[Tensor, "*b D"], weight: Float[Tensor, "D"], epsilon: float
) -> Float[Tensor, "*b D"]:
    """`RMSNorm.normalise`, whose mean alone takes as long as these five operations."""
    if not _is_few(x) or x.dtype != weight.dtype:
        return normalise(x, weight, epsilon)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = torch.addcmul(_as_tensor(epsilon), length, length, value=1 / x.shape[-1]).rsqrt_()
    return (x * scale).to(weight.dtype).mul_(weight)


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
    large = weight.dtype == torch.float32 and weight.numel() >= MIN_WEIGHTS
    return _is_on_cpu(weight) and whole and large


def _is_on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and not isinstance(weight, DTensor)


def _is_few(x: Tensor) -> bool:
    return 0 < x.numel() <= MAX_ROWS * x.shape[-1] and not torch.is_grad_enabled()


_as_tensor = cache(lambda number: torch.tensor([number]))
