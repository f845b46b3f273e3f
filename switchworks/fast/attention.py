"""Attention in blocks, whose backward pass keeps nothing of the size of its scores.

The reference is `model.attention.attend`. Forward is torch's fused kernel where it has one for
the device, called per block with the bias of that block. Backward computes the weights of a block
again from its arguments, which is all that is kept; every key is in each block, so they are a
softmax like the reference's. The gradient of the relative bias is summed over the batch as it
comes, and then along the diagonals, so it is as small as the bias itself.

Dropout is the reference's own mask. It is the same for all queries, so dropping a weight is
dropping a value: (w * mask) v = w (mask v). It costs as much as the values are large.

Letters: B sequences, H heads, L query length, M key length, K head width, N = L + M - 1 distances;
small letters are a block's share.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchworks.model import FactoredBias, SharedDropout, attend

BLOCK = 2**21
"""Scores computed at once: 8 MB in float32, of which backward has five at a time."""


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""From q, k, v, the distances and what is hidden, softmax(q k^T + bias) v and its gradients."""


def attend_by(
    kernel: Kernel,
    q: Float[Tensor, "B H L K"],
    k: Float[Tensor, "B H M K"],
    v: Float[Tensor, "B H M K"],
    bias: Float[Tensor, "#B #H #L M"] | FactoredBias | None,
    dropout: SharedDropout,
) -> Float[Tensor, "B H L K"]:
    """What `attend` gives, with the same gradients of q, k, v and the distances in `bias`.

    A bias that is a tensor must be a mask: it gets no gradient. Without gradients, and for a bias
    that is to get one all the same, this is `attend` itself.
    """
    whole = isinstance(bias, Tensor)
    if not torch.is_grad_enabled() or (whole and bias.requires_grad):
        assert bias is None or whole
        return attend(q, k, v, bias, dropout)
    if dropout.training and dropout.rate > 0:
        v = v * dropout(v.new_ones(*k.shape[:2], 1, k.shape[2])).mT  # as the reference draws it
    if isinstance(bias, FactoredBias):
        return kernel(q, k, v, bias.distances, bias.hidden)
    return kernel(q, k, v, None, bias)


class _Attention(torch.autograd.Function):
    """softmax(q k^T + bias) v; kept for backward are the arguments and nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Float[Tensor, "B H L K"],
        k: Float[Tensor, "B H M K"],
        v: Float[Tensor, "B H M K"],
        distances: Float[Tensor, "H N"] | None,
        hidden: Float[Tensor, "#B #H #L M"] | None,
    ) -> Float[Tensor, "B H L K"]:
        # Heads lie side by side in memory, as the matrix that mixes them wants them.
        answer = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        bias = _Bias(distances, hidden, q, k)
        for rows, queries in blocks(q, k):
            block = bias.block(rows, queries)
            answer[rows, :, queries] = _forward(q[rows, :, queries], k[rows], v[rows], block)
        ctx.save_for_backward(q, k, v, distances, hidden)
        return answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_answer: Float[Tensor, "B H L K"]) -> tuple[Tensor | None, ...]:
        q, k, v, distances, hidden = ctx.saved_tensors
        heads, wide = q.shape[1], _wide(q.dtype)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (x.new_zeros(x.shape, dtype=wide).flatten(0, 1) for x in (k, v))
        bias = _Bias(distances, hidden, q, k)
        for rows, queries in blocks(q, k):
            stack = slice(rows.start * heads, rows.stop * heads)
            part, given = (x[rows, :, queries].flatten(0, 1) for x in (q, of_answer))
            keys, values = k[rows].flatten(0, 1), v[rows].flatten(0, 1)
            weights = _scores(part, keys, bias.block(rows, queries), heads).softmax(dim=-1)
            _accumulate(grad_v[stack], weights.to(q.dtype).mT, given)
            grad_weights = (given @ values.mT).to(wide)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, wide)  # pyright: ignore[reportPrivateImportUsage]
            bias.accumulate(grad_scores)
            grad_scores = grad_scores.to(q.dtype)
            grad_q[rows, :, queries] = (grad_scores @ keys).unflatten(0, (-1, heads))
            _accumulate(grad_k[stack], grad_scores.mT, part)
        grad_k, grad_v = (x.unflatten(0, (-1, heads)).to(k.dtype) for x in (grad_k, grad_v))
        return grad_q, grad_k, grad_v, bias.gradient(), None


def in_blocks(
    q: Float[Tensor, "B H L K"],
    k: Float[Tensor, "B H M K"],
    v: Float[Tensor, "B H M K"],
    distances: Float[Tensor, "H N"] | None,
    hidden: Float[Tensor, "#B #H #L M"] | None,
) -> Float[Tensor, "B H L K"]:
    """softmax(q k^T + bias) v, about `BLOCK` scores at a time, of which none is kept."""
    return _Attention.apply(q, k, v, distances, hidden)


attend_in_blocks = partial(attend_by, in_blocks)


def blocks(
    q: Float[Tensor, "B H L K"], k: Float[Tensor, "B H M K"]
) -> Iterator[tuple[slice, slice]]:
    """(rows, queries): together every query of every row once, about `BLOCK` scores at a time.

    Several whole rows where they are short; parts of the queries of one row where it is long.
    """
    per_query = k.shape[1] * k.shape[2]
    length = min(q.shape[2], max(1, BLOCK // per_query))
    count = max(1, BLOCK // (per_query * length))
    for first in range(0, q.shape[2], length):
        for row in range(0, q.shape[0], count):
            yield (
                slice(row, min(row + count, len(q))),
                slice(first, min(first + length, q.shape[2])),
            )


def spread_diagonals(
    distances: Float[Tensor, "H l_plus_M_minus_1"], num_keys: int
) -> Float[Tensor, "H l M"]:
    """The matrix whose entry (i, j) is that of distance j - i, the least of which comes first."""
    return distances.unfold(1, num_keys, 1).flip(1)


def sum_diagonals(matrix: Float[Tensor, "H l M"]) -> Float[Tensor, "H l_plus_M_minus_1"]:
    """The sums over equal j - i, the least distance first: the transpose of `spread_diagonals`.

    Row i of the upturned matrix moves i places to the right: that is what reading rows of M + l
    numbers as rows of M + l - 1 does.
    """
    heads, length, keys = matrix.shape
    padded = F.pad(matrix.flip(1), (0, length)).flatten(1)
    return padded[:, : length * (keys + length - 1)].view(heads, length, -1).sum(dim=1)


class _Bias:
    """Distances and mask, put together for one block after the other; their gradient, taken apart.

    All rows of some queries come before the next queries, so what depends on the queries alone is
    made once for all rows.
    """

    def __init__(
        self,
        distances: Float[Tensor, "H N"] | None,
        hidden: Float[Tensor, "#B #H #L M"] | None,
        q: Float[Tensor, "B H L K"],
        k: Float[Tensor, "B H M K"],
    ) -> None:
        self.distances, self.hidden = distances, hidden
        self.length, self.num_keys, self.dtype = q.shape[2], k.shape[2], _wide(q.dtype)
        self.queries = slice(0, 0)
        self.spread: Tensor | None = None
        self.summed: Tensor | None = None
        self.grad_distances = (
            None if distances is None else torch.zeros_like(distances, dtype=self.dtype)
        )

    def block(self, rows: slice, queries: slice) -> Float[Tensor, "#b #H #l M"] | None:
        """The bias of one block, in the dtype that softmax has."""
        if queries != self.queries:
            self._turn_to(queries)
        if self.hidden is None:
            return self.spread
        hidden = self.hidden if self.hidden.shape[0] == 1 else self.hidden[rows]
        hidden = hidden if hidden.shape[2] == 1 else hidden[:, :, queries]
        hidden = hidden.to(self.dtype)
        return hidden if self.spread is None else self.spread + hidden

    def accumulate(self, grad_scores: Float[Tensor, "bH l M"]) -> None:
        """Add what the scores of the block last asked for have to say."""
        if self.summed is not None:
            by_row = grad_scores.unflatten(0, (-1, len(self.summed)))
            self.summed += by_row[0] if len(by_row) == 1 else by_row.sum(dim=0)

    def gradient(self) -> Float[Tensor, "H N"] | None:
        """The gradient of the distances, when all blocks have been."""
        if self.distances is None or self.grad_distances is None:
            return None
        self._turn_to(slice(0, 0))
        return self.grad_distances.to(self.distances.dtype)

    def _turn_to(self, queries: slice) -> None:
        """Be done with the queries before, and spread the distances of these."""
        if self.distances is None or self.grad_distances is None:
            return
        if self.summed is not None:
            self._of(self.grad_distances, self.queries).add_(sum_diagonals(self.summed))
        self.queries, self.spread, self.summed = queries, None, None
        if queries.stop > queries.start:
            taken = self._of(self.distances, queries).to(self.dtype)
            spread = spread_diagonals(taken, self.num_keys)
            self.spread, self.summed = spread[None], torch.zeros_like(spread)

    def _of(self, distances: Float[Tensor, "H N"], queries: slice) -> Float[Tensor, "H n"]:
        """Those distances that keys have from `queries`."""
        first = self.length - queries.stop
        return distances[:, first : first + queries.stop - queries.start + self.num_keys - 1]


def _forward(
    q: Float[Tensor, "b H l K"],
    k: Float[Tensor, "b H M K"],
    v: Float[Tensor, "b H M K"],
    bias: Float[Tensor, "#b #H #l M"] | None,
) -> Float[Tensor, "b H l K"]:
    """The answer of one block."""
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
    scores = (q @ k.mT).to(_wide(q.dtype))
    if bias is not None:
        scores.unflatten(0, (-1, heads)).add_(bias)
    return scores


def _accumulate(
    total: Float[Tensor, "bH M K"], a: Float[Tensor, "bH M l"], b: Float[Tensor, "bH l K"]
) -> None:
    """Add a b to `total`, whose dtype may be wider."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total += a @ b


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
