"""Attention by torch's FlexAttention, for GPUs: one fused kernel whose scores never reach memory.

The reference is `model.attention.attend`. The relative bias is a vector per head, read by
distance inside the kernel, and its gradient is summed there too (torch >= 2.6). What is hidden
is added to the scores as everywhere else; no block is skipped for it.

A query that sees nothing gets an average as in the reference, but its gradients are not the
reference's: beside -1e9 float32 forgets the logarithm of the number of keys, from which the kernel
computes its weights again. Such queries are padding, which no loss asks about: what comes from
above is 0, and so is its multiple.

Letters: B sequences, H heads, L query length, M key length, K head width, N = L + M - 1 distances.
"""

from functools import cache, partial
from typing import cast, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from switchworks.fast.attention import Kernel, attend_by, in_blocks

KINDS = 64
"""Combinations of bias, mask and lengths, beyond which something is wrong. torch's own limit, 8,
is less than a model with packed rows and several lengths has."""

NARROWEST = 16
"""The kernel multiplies tiles, which are no narrower than this."""


def fused(
    q: Float[Tensor, "B H L K"],
    k: Float[Tensor, "B H M K"],
    v: Float[Tensor, "B H M K"],
    distances: Float[Tensor, "H N"] | None,
    hidden: Float[Tensor, "#B 1 #L M"] | None,
) -> Float[Tensor, "B H L K"]:
    """softmax(q k^T + bias) v. Float64 and narrow heads, which the kernel does not know, are done
    in blocks."""
    known = q.dtype != torch.float64 and q.shape[-1] >= NARROWEST
    return (_compiled() if known else in_blocks)(q, k, v, distances, hidden)


attend_fused = partial(attend_by, fused)


def answer(
    q: Float[Tensor, "B H L K"],
    k: Float[Tensor, "B H M K"],
    v: Float[Tensor, "B H M K"],
    distances: Float[Tensor, "H N"] | None,
    hidden: Float[Tensor, "#B 1 #L M"] | None,
) -> Float[Tensor, "B H L K"]:
    """softmax(q k^T + bias) v with the bias put together score by score."""
    last = q.shape[2] - 1

    @no_type_check
    def biased(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if distances is not None:
            score = score + distances[head, key - query + last]
        if hidden is not None:
            of_row = row if hidden.shape[0] > 1 else 0
            of_query = query if hidden.shape[2] > 1 else 0
            score = score + hidden[of_row, 0, of_query, key]
        return score

    return cast(Tensor, flex_attention(q, k, v, score_mod=biased, scale=1.0))


@cache
def _compiled() -> Kernel:
    """`answer` as one kernel, generated at the first use of each kind of mask; never unfused."""
    return torch.compile(  # pyright: ignore[reportCallIssue]  the stubs forget the last two
        answer, fullgraph=True, recompile_limit=KINDS, isolate_recompiles=True
    )
