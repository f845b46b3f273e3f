"""Attention in blocks, whose backward pass keeps nothing of the size of its scores.

The reference is `model.attention.attend`. Forward is torch's fused kernel where it has one for
the device, called per block with the bias of that block; it gives the log-normaliser of each
query, from which backward computes the weights again. The gradient of the relative bias is summed
over the batch and along the diagonals as it comes, so it is as small as the bias itself.

Dropout is the reference's own mask. It is the same for all queries, so dropping a weight is
dropping a value: (w * mask) v = w (mask v). It costs as much as the values are large.

Letters: B sequences, H heads, L query length, M key length, K head width, N = L + M - 1 distances;
small letters are a block's share.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchworks.model.attention import BiasParts, attend
from switchworks.model.layers import SharedDropout

BLOCK = 2**20
"""Scores computed at once: 4 MB in float32, which stay in the cache of most processors."""

_BLIND = -1e4
"""A log-normaliser below this is that of a query whose every key is hidden."""


def attend_in_blocks(
    q: Float[Tensor, "B H L K"],
    k: Float[Tensor, "B H M K"],
    v: Float[Tensor, "B H M K"],
    bias: Float[Tensor, "#B #H #L M"] | BiasParts | None,
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
    if isinstance(bias, BiasParts):
        return _Attention.apply(q, k, v, bias.distances, bias.hidden)
    return _Attention.apply(q, k, v, None, bias)


class _Attention(torch.autograd.Function):
    """softmax(q k^T + bias) v; kept for backward are the arguments, the answer and L numbers."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Float[Tensor, "B H L K"],
        k: Float[Tensor, "B H M K"],
        v: Float[Tensor, "B H M K"],
        distances: Float[Tensor, "H N"] | None,
        hidden: Float[Tensor, "#B #H #L M"] | None,
    ) -> Float[Tensor, "B H L K"]:
        answer = torch.empty_like(q, memory_format=torch.contiguous_format)
        log_z = q.new_empty(q.shape[:3], dtype=_wide(q.dtype))
        for rows, queries in blocks(q, k):
            bias = _bias_of(distances, hidden, rows, queries, q, k)
            part = q[rows, :, queries]
            answer[rows, :, queries], log_z[rows, :, queries] = _forward(
                part, k[rows], v[rows], bias
            )
        ctx.save_for_backward(q, k, v, distances, hidden, answer, log_z)
        return answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_answer: Float[Tensor, "B H L K"]) -> tuple[Tensor | None, ...]:
        q, k, v, distances, hidden, answer, log_z = ctx.saved_tensors
        wide = log_z.dtype
        of_q = torch.empty_like(q)
        of_k, of_v = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
        of_distances = None
        if distances is not None:
            of_distances = torch.zeros(distances.shape, dtype=wide, device=q.device)
        for rows, queries in blocks(q, k):
            part, of_part = q[rows, :, queries], of_answer[rows, :, queries]
            bias = _bias_of(distances, hidden, rows, queries, q, k)
            weights = _weights(_scores(part, k[rows], bias), log_z[rows, :, queries])
            of_v[rows] += weights.to(q.dtype).mT @ of_part
            inner = (of_part.to(wide) * answer[rows, :, queries]).sum(dim=-1, keepdim=True)
            of_scores = (of_part @ v[rows].mT).to(wide).sub_(inner).mul_(weights)
            if of_distances is not None:
                first = q.shape[2] - queries.stop
                by_distance = sum_diagonals(of_scores.sum(dim=0))
                of_distances[:, first : first + by_distance.shape[1]] += by_distance
            of_scores = of_scores.to(q.dtype)
            of_q[rows, :, queries] = of_scores @ k[rows]
            of_k[rows] += of_scores.mT @ part
        if of_distances is not None and distances is not None:
            of_distances = of_distances.to(distances.dtype)
        return of_q, of_k.to(k.dtype), of_v.to(v.dtype), of_distances, None


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
            yield slice(row, row + count), slice(first, min(first + length, q.shape[2]))


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


def _bias_of(
    distances: Float[Tensor, "H N"] | None,
    hidden: Float[Tensor, "#B #H #L M"] | None,
    rows: slice,
    queries: slice,
    q: Float[Tensor, "B H L K"],
    k: Float[Tensor, "B H M K"],
) -> Float[Tensor, "#b #H #l M"] | None:
    """The bias of one block, in the dtype that softmax has."""
    bias = None
    if distances is not None:
        first, num_keys = q.shape[2] - queries.stop, k.shape[2]
        taken = distances[:, first : first + queries.stop - queries.start + num_keys - 1]
        bias = spread_diagonals(taken.to(_wide(q.dtype)), num_keys)[None]
    if hidden is None:
        return bias
    hidden = hidden if hidden.shape[0] == 1 else hidden[rows]
    hidden = hidden if hidden.shape[2] == 1 else hidden[:, :, queries]
    hidden = hidden.to(_wide(q.dtype))
    return hidden if bias is None else bias + hidden


def _forward(
    q: Float[Tensor, "b H l K"],
    k: Float[Tensor, "b H M K"],
    v: Float[Tensor, "b H M K"],
    bias: Float[Tensor, "#b #H #l M"] | None,
) -> tuple[Float[Tensor, "b H l K"], Float[Tensor, "b H l"]]:
    """Answer and log-normaliser of one block."""
    if q.device.type == "cpu" and q.dtype != torch.float16:
        if bias is not None:
            bias = bias.expand(*q.shape[:3], -1)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(q, k, v, 0.0, False, attn_mask=bias, scale=1.0)
    scores = _scores(q, k, bias)
    log_z = scores.logsumexp(dim=-1)
    return scores.sub_(log_z[..., None]).exp_().to(v.dtype) @ v, log_z


def _scores(
    q: Float[Tensor, "b H l K"],
    k: Float[Tensor, "b H M K"],
    bias: Float[Tensor, "#b #H #l M"] | None,
) -> Float[Tensor, "b H l M"]:
    scores = (q @ k.mT).to(_wide(q.dtype))
    return scores if bias is None else scores.add_(bias)


def _weights(
    scores: Float[Tensor, "b H l M"], log_z: Float[Tensor, "b H l"]
) -> Float[Tensor, "b H l M"]:
    """The softmax of `scores`, in their memory, by log-normalisers where these are exact.

    A query that sees no key has scores around -1e9, beside which the logarithm of a count is lost.
    """
    blind = log_z < _BLIND
    again = scores[blind].softmax(dim=-1) if blind.any() else None
    weights = scores.sub_(log_z[..., None]).exp_()
    if again is not None:
        weights[blind] = again
    return weights


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
