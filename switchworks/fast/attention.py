"""Attention in blocks, whose backward pass keeps nothing of the size of its scores.

The reference is `model.attention.attend`. Backward recomputes the weights of a block from the
arguments; every key is in each block, so they are a softmax like the reference's.

Dropout has the mask of the reference. It is the same for all queries, so dropping a weight is
dropping a value: (w * mask) v = w (mask v), which costs a product of the size of the values.

Letters: B sequences, H heads, L query length, M key length, K head width, N = L + M - 1 distances;
small letters are a block's share.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchworks.model import Bias, RelativeBias, SharedDropout, attend, compute_dtype

BLOCK = 2**21
"""Scores computed at once: 8 MB in float32, of which backward has five at a time."""


class FactoredBias(NamedTuple):
    """The bias of self-attention as its factors, for kernels that build it block by block.

    Stands for the tensor [#B, H, L, M] of `distances[:, m - l + L - 1] + mask`, of which neither
    factor has the size. Adding a mask gives a `FactoredBias` with that mask.
    """

    distances: Float[Tensor, "H L_plus_M_minus_1"]
    """The bias of each distance m - l between query and key, from 1 - L to M - 1."""
    mask: Float[Tensor, "#B 1 #L M"] | None = None
    """From `mask_to_bias`; without a gradient."""

    @property
    def dtype(self) -> torch.dtype:
        """That of the learned numbers."""
        return self.distances.dtype

    def __add__(self, mask: Tensor) -> "FactoredBias":  # type: ignore[override]
        return self._replace(mask=mask if self.mask is None else self.mask + mask)


def factored(positions: RelativeBias, num_queries: int, num_keys: int, first: int) -> Bias:
    """`RelativeBias.form`: a `FactoredBias`, under gradients alone."""
    if not torch.is_grad_enabled():
        return RelativeBias.form(positions, num_queries, num_keys, first)
    ends = 1 - num_queries - first, num_keys - first
    distances = torch.arange(*ends, device=positions.weight.device)
    return FactoredBias(positions.by_distance(distances[None])[:, 0])


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""(q, k, v, distances, mask) -> softmax(q k^T + bias) v, with gradients."""


def attend_by(
    kernel: Kernel,
    q: Float[Tensor, "B H L K"],
    k: Float[Tensor, "B H M K"],
    v: Float[Tensor, "B H M K"],
    bias: Float[Tensor, "#B #H #L M"] | FactoredBias | None,
    dropout: SharedDropout,
) -> Float[Tensor, "B H L K"]:
    """`attend` by `kernel`, with the same gradients of q, k, v and the distances in `bias`.

    A bias that is a tensor must be a mask: it gets no gradient. Without gradients, and for a tensor
    that requires one, this is `attend` itself.
    """
    is_tensor = isinstance(bias, Tensor)
    if not torch.is_grad_enabled() or (is_tensor and bias.requires_grad):
        assert bias is None or is_tensor
        return attend(q, k, v, bias, dropout)
    if dropout.training and dropout.rate > 0:
        v = v * dropout(v.new_ones(*k.shape[:2], 1, k.shape[2])).mT  # drawn as in the reference
    if isinstance(bias, FactoredBias):
        return kernel(q, k, v, bias.distances, bias.mask)
    return kernel(q, k, v, None, bias)


class _Attention(torch.autograd.Function):
    """softmax(q k^T + bias) v; only the arguments are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Float[Tensor, "B H L K"],
        k: Float[Tensor, "B H M K"],
        v: Float[Tensor, "B H M K"],
        distances: Float[Tensor, "H N"] | None,
        mask: Float[Tensor, "#B #H #L M"] | None,
    ) -> Float[Tensor, "B H L K"]:
        # Heads lie side by side in memory, as the output matrix reads them.
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        for queries, row_blocks in blocks(q, k):
            spread = _spread(distances, queries, q, k)
            for rows in row_blocks:
                bias = _with_mask(spread, mask, rows, queries, compute_dtype(q.dtype))
                out[rows, :, queries] = _forward(q[rows, :, queries], k[rows], v[rows], bias)
        ctx.save_for_backward(q, k, v, distances, mask)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Float[Tensor, "B H L K"]) -> tuple[Tensor | None, ...]:
        q, k, v, distances, mask = ctx.saved_tensors
        heads, wide = q.shape[1], compute_dtype(q.dtype)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (x.new_zeros(x.shape, dtype=wide).flatten(0, 1) for x in (k, v))
        grad_distances = None if distances is None else torch.zeros_like(distances, dtype=wide)
        for queries, row_blocks in blocks(q, k):
            spread = _spread(distances, queries, q, k)
            grad_spread = None if spread is None else torch.zeros_like(spread)
            for rows in row_blocks:
                # Rows and heads are one batch dimension here: bH.
                batch = slice(rows.start * heads, rows.stop * heads)
                block_q, block_grad = (x[rows, :, queries].flatten(0, 1) for x in (q, grad_out))
                keys, values = k[rows].flatten(0, 1), v[rows].flatten(0, 1)
                bias = _with_mask(spread, mask, rows, queries, wide)
                weights = _scores(block_q, keys, bias, heads).softmax(dim=-1)
                # out = W v, so dv = W^T dout and dW = dout v^T; then back through the softmax.
                _accumulate(grad_v[batch], weights.to(q.dtype).mT, block_grad)
                grad_weights = (block_grad @ values.mT).to(wide)
                grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, wide)  # pyright: ignore[reportPrivateImportUsage]
                # scores = q k^T + bias: the bias gets this gradient as it is, q and k its products.
                if grad_spread is not None:
                    by_row = grad_scores.unflatten(0, (-1, heads))
                    grad_spread += by_row if len(by_row) == 1 else by_row.sum(dim=0)
                grad_scores = grad_scores.to(q.dtype)
                grad_q[rows, :, queries] = (grad_scores @ keys).unflatten(0, (-1, heads))
                _accumulate(grad_k[batch], grad_scores.mT, block_q)
            if grad_distances is not None and grad_spread is not None:
                grad_distances[:, _window(queries, q, k)] += sum_diagonals(grad_spread[0])
        grad_k, grad_v = (x.unflatten(0, (-1, heads)).to(k.dtype) for x in (grad_k, grad_v))
        if distances is not None and grad_distances is not None:
            grad_distances = grad_distances.to(distances.dtype)
        return grad_q, grad_k, grad_v, grad_distances, None


in_blocks: Kernel = _Attention.apply  # type: ignore[assignment]
"""softmax(q k^T + bias) v, about `BLOCK` scores at a time, none of them kept."""

attend_in_blocks = partial(attend_by, in_blocks)


def blocks(
    q: Float[Tensor, "B H L K"], k: Float[Tensor, "B H M K"]
) -> Iterator[tuple[slice, list[slice]]]:
    """(queries, blocks of rows): together every query of every row once, about `BLOCK` scores at a
    time, of several whole rows if they are short or of parts of one."""
    per_query = k.shape[1] * k.shape[2]
    length = min(q.shape[2], max(1, BLOCK // per_query))
    count = max(1, BLOCK // (per_query * length))
    rows = [slice(row, min(row + count, len(q))) for row in range(0, len(q), count)]
    for first in range(0, q.shape[2], length):
        yield slice(first, min(first + length, q.shape[2])), rows


def spread_diagonals(
    distances: Float[Tensor, "H l_plus_M_minus_1"], num_keys: int
) -> Float[Tensor, "H l M"]:
    """The matrix with `distances[j - i + l - 1]` at (i, j)."""
    return distances.unfold(1, num_keys, 1).flip(1)


def sum_diagonals(matrix: Float[Tensor, "H l M"]) -> Float[Tensor, "H l_plus_M_minus_1"]:
    """The sums over equal j - i, the least distance first: the transpose of `spread_diagonals`.

    Flipped, diagonals become antidiagonals. Padding rows to M + l numbers and viewing the memory as
    rows of M + l - 1 moves row i by i places, so that each diagonal is a column to sum.
    """
    heads, length, keys = matrix.shape
    padded = F.pad(matrix.flip(1), (0, length)).flatten(1)
    return padded[:, : length * (keys + length - 1)].view(heads, length, -1).sum(dim=1)


def _window(queries: slice, q: Tensor, k: Tensor) -> slice:
    """The distances between all keys and `queries`, among those of all queries."""
    first = q.shape[2] - queries.stop
    return slice(first, first + queries.stop - queries.start + k.shape[2] - 1)


def _spread(
    distances: Float[Tensor, "H N"] | None, queries: slice, q: Tensor, k: Tensor
) -> Float[Tensor, "1 H l M"] | None:
    """The relative bias of `queries`, in the dtype of the softmax; the same for all rows."""
    if distances is None:
        return None
    window = distances[:, _window(queries, q, k)].to(compute_dtype(q.dtype))
    return spread_diagonals(window, k.shape[2])[None]


def _with_mask(
    spread: Float[Tensor, "1 H l M"] | None,
    mask: Float[Tensor, "#B #H #L M"] | None,
    rows: slice,
    queries: slice,
    dtype: torch.dtype,
) -> Float[Tensor, "#b #H #l M"] | None:
    """The bias of one block, in the dtype of its softmax."""
    if mask is None:
        return spread
    mask = mask if mask.shape[0] == 1 else mask[rows]
    mask = (mask if mask.shape[2] == 1 else mask[:, :, queries]).to(dtype)
    return mask if spread is None else spread + mask


def _forward(
    q: Float[Tensor, "b H l K"],
    k: Float[Tensor, "b H M K"],
    v: Float[Tensor, "b H M K"],
    bias: Float[Tensor, "#b #H #l M"] | None,
) -> Float[Tensor, "b H l K"]:
    if q.device.type == "cpu" and q.dtype != torch.float16:
        if bias is not None:
            bias = bias.expand(*q.shape[:3], -1)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(q, k, v, 0.0, False, attn_mask=bias, scale=1.0)[0]
    heads = q.shape[1]
    scores = _scores(q.flatten(0, 1), k.flatten(0, 1), bias, heads)
    return (scores.softmax(dim=-1).to(v.dtype) @ v.flatten(0, 1)).unflatten(0, (-1, heads))


def _scores(
    q: Float[Tensor, "bH l K"],
    k: Float[Tensor, "bH M K"],
    bias: Float[Tensor, "#b #H #l M"] | None,
    heads: int,
) -> Float[Tensor, "bH l M"]:
    scores = (q @ k.mT).to(compute_dtype(q.dtype))
    if bias is not None:
        scores.unflatten(0, (-1, heads)).add_(bias)
    return scores


def _accumulate(
    total: Float[Tensor, "bH M K"], a: Float[Tensor, "bH M l"], b: Float[Tensor, "bH l K"]
) -> None:
    """Adds a b to `total`, which may be float32 where a and b have 16 bits."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total += a @ b
