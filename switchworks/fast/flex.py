"""Attention by torch's FlexAttention, for GPUs: one fused kernel whose scores never reach memory.

The reference is `model.attention.attend`. A query with all keys masked gets an average as
there, but not the reference's gradients: beside -1e9 float32 loses the logarithm of the number of
keys, from which the kernel recomputes its weights. Such queries are padding: their gradient is 0.

Letters: B sequences, H heads, L query length, M key length, K head width, N = L + M - 1 distances.
"""

from functools import cache, partial
from typing import cast, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from switchworks.fast.attention import Kernel, attend_by, in_blocks

MAX_COMPILED = 64
"""Combinations of bias, mask and lengths that may be compiled. torch's limit, 8, is less than a
model with packed rows and several lengths has."""

MIN_HEAD_WIDTH = 16
"""Width of the tiles that the kernel multiplies."""


def fused(
    q: Float[Tensor, "B H L K"],
    k: Float[Tensor, "B H M K"],
    v: Float[Tensor, "B H M K"],
    distances: Float[Tensor, "H N"] | None,
    mask: Float[Tensor, "#B 1 #L M"] | None,
) -> Float[Tensor, "B H L K"]:
    """softmax(q k^T + bias) v; in blocks for float64 and narrow heads, which the kernel lacks."""
    known = q.dtype != torch.float64 and q.shape[-1] >= MIN_HEAD_WIDTH
    return (_compiled() if known else in_blocks)(q, k, v, distances, mask)


attend_fused = partial(attend_by, fused)


def flex(
    q: Float[Tensor, "B H L K"],
    k: Float[Tensor, "B H M K"],
    v: Float[Tensor, "B H M K"],
    distances: Float[Tensor, "H N"] | None,
    mask: Float[Tensor, "#B 1 #L M"] | None,
) -> Float[Tensor, "B H L K"]:
    """softmax(q k^T + bias) v with the bias added score by score."""
    last = q.shape[2] - 1

    @no_type_check
    def biased(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if distances is not None:
            score = score + distances[head, key - query + last]
        if mask is not None:
            mask_row = row if mask.shape[0] > 1 else 0
            mask_query = query if mask.shape[2] > 1 else 0
            score = score + mask[mask_row, 0, mask_query, key]
        return score

    return cast(Tensor, flex_attention(q, k, v, score_mod=biased, scale=1.0))


@cache
def _compiled() -> Kernel:
    """`flex` as one kernel, generated at the first use of each kind of mask; never unfused."""
    return torch.compile(  # pyright: ignore[reportCallIssue]  the stubs forget the last two
        flex, fullgraph=True, recompile_limit=MAX_COMPILED, isolate_recompiles=True
    )
