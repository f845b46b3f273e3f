"""Attention as in T5: no biases, no 1/sqrt(d_k), and a learned relative position bias.

The missing factor is folded into the initialisation of the query (see `init.py`). The bias is
one table per stack, shared by its layers, for self-attention only; it depends on the distance
between two positions, so packed examples need no position ids: distances inside a segment are
what they would be alone.

Letters: B sequences, H heads, L query length, M key length, K head width, D model width.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from switchworks.model.config import ModelConfig
from switchworks.model.layers import SharedDropout, look_up, to_float32

MASKED = -1e9
"""Added to the score of a key that must not be seen. Finite, so that a query which sees no key
at all (a padded row) gets a meaningless average and not NaN."""


def relative_bucket(
    distance: Int[Tensor, "L M"], *, bidirectional: bool, buckets: int, max_distance: int
) -> Int[Tensor, "L M"]:
    """Bucket of each `distance` = key position - query position (Mesh-TF
    `_relative_position_bucket`).

    Bidirectional: half the buckets per direction, the upper half for keys after the query. Near
    distances have a bucket each; the rest share buckets that widen logarithmically up to
    `max_distance`, beyond which all share the last.
    """
    bucket = torch.zeros_like(distance)
    away = -distance
    if bidirectional:
        buckets //= 2
        bucket = bucket + (away < 0).to(bucket.dtype) * buckets
        away = away.abs()
    else:
        away = away.clamp(min=0)
    exact = buckets // 2
    ratio = torch.log(away.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (buckets - exact)).to(bucket.dtype)).clamp(max=buckets - 1)
    return bucket + torch.where(away < exact, away, far)


class FactoredBias(NamedTuple):
    """The bias of self-attention not yet put together, for kernels that do so block by block.

    Stands for the tensor [#B, H, L, M] of `distances[:, m - l + L - 1] + hidden`, of which nothing
    is as large. Adding a mask gives the parts with that mask.
    """

    distances: Float[Tensor, "H L_plus_M_minus_1"]
    """The bias of each distance m - l between query and key, from 1 - L to M - 1."""
    hidden: Float[Tensor, "#B 1 #L M"] | None = None
    """What `mask_to_bias` says; without a gradient."""

    @property
    def dtype(self) -> torch.dtype:
        """The learned numbers' own."""
        return self.distances.dtype

    def __add__(self, hidden: Tensor) -> "BiasParts":  # type: ignore[override]
        """These parts with `hidden` added to what is hidden already."""
        return self._replace(hidden=hidden if self.hidden is None else self.hidden + hidden)


class RelativeBias(nn.Module):
    """A learned number per head and distance bucket, added to self-attention's scores."""

    letters = {"weight": "_ H"}  # noqa: RUF012
    in_parts = False
    """Set from outside where attention has a kernel for `FactoredBias`; without gradients there is
    the tensor all the same."""

    def __init__(self, config: ModelConfig, *, bidirectional: bool) -> None:
        super().__init__()
        self.bidirectional = bidirectional
        self.max_distance = config.relative_max_distance
        self.weight = nn.Parameter(torch.empty(config.relative_buckets, config.num_heads))

    def forward(
        self, num_queries: int, num_keys: int, first: int = 0
    ) -> Float[Tensor, "1 H L M"] | FactoredBias:
        """The bias for queries at positions first, first + 1, ... and keys from position 0."""
        device = self.weight.device
        if self.in_parts and torch.is_grad_enabled():
            distances = torch.arange(1 - num_queries - first, num_keys - first, device=device)
            return FactoredBias(self._of(distances[None])[:, 0])
        queries = torch.arange(first, first + num_queries, device=device)
        keys = torch.arange(num_keys, device=device)
        return self._of(keys[None] - queries[:, None])[None]

    def _of(self, distances: Int[Tensor, "L M"]) -> Float[Tensor, "H L M"]:
        bucket = relative_bucket(
            distances,
            bidirectional=self.bidirectional,
            buckets=self.weight.shape[0],
            max_distance=self.max_distance,
        )
        return look_up(self.weight, bucket).permute(2, 0, 1)


def segment_mask(
    query_segments: Int[Tensor, "B L"], key_segments: Int[Tensor, "B M"]
) -> Bool[Tensor, "B 1 L M"]:
    """True where query and key belong to the same example."""
    return (query_segments[:, :, None] == key_segments[:, None, :])[:, None]


def causal(num_queries: int, num_keys: int, device: torch.device) -> Bool[Tensor, "1 1 L M"]:
    """True where the key is not after the query; the last query stands at the last key."""
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return ones.tril(diagonal=num_keys - num_queries)[None, None]


def mask_to_bias(mask: Bool[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    """0 where `mask` is True and a large negative number elsewhere, to be added to scores."""
    hidden = max(MASKED, torch.finfo(dtype).min / 2)  # float16 ends at -65504
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, hidden)


def attend(
    q: Float[Tensor, "B H L K"],
    k: Float[Tensor, "B H M K"],
    v: Float[Tensor, "B H M K"],
    bias: Float[Tensor, "#B #H #L M"] | None,
    dropout: SharedDropout,
) -> Float[Tensor, "B H L K"]:
    """softmax(q k^T + bias) v, unscaled, with the softmax in float32 or wider.

    The plain form, and the reference for every faster one. Without gradients torch's fused
    kernel computes the same.
    """
    if not torch.is_grad_enabled():
        bias = None if bias is None else bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
    scores = q @ k.mT
    if bias is not None:
        scores = scores + bias
    weights = to_float32(scores).softmax(dim=-1).to(q.dtype)
    return dropout(weights) @ v


Attend = Callable[[Tensor, Tensor, Tensor, Any, SharedDropout], Tensor]
"""`attend`, or a faster form of it that takes a bias in parts too."""


class KeyValues(NamedTuple):
    """Keys and values of one attention layer."""

    k: Float[Tensor, "B H M K"]
    v: Float[Tensor, "B H M K"]


class AttentionBase(nn.Module):
    """What every attention ends with: heads that read, and one matrix that mixes them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.o = nn.Linear(config.num_heads * config.d_kv, config.d_model, bias=False)
        self.dropout = SharedDropout(config.dropout)
        self.attend: Attend = attend

    def attend_out(
        self,
        query: Float[Tensor, "B H L K"],
        memory: KeyValues,
        bias: Float[Tensor, "#B #H #L M"] | FactoredBias | None,
    ) -> Float[Tensor, "B L D"]:
        """What each query reads from `memory`."""
        return self.o(join_heads(self.attend(query, memory.k, memory.v, bias, self.dropout)))


class Attention(AttentionBase):
    """Multi-head attention from `x` to `memory`. H in the letters stands for H * K rows."""

    letters = {  # noqa: RUF012
        "q.weight": "H D",
        "k.weight": "H D",
        "v.weight": "H D",
        "o.weight": "D H",
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)

    def project(self, memory: Float[Tensor, "B M D"]) -> KeyValues:
        """The keys and values of `memory`."""
        heads = self.num_heads
        return KeyValues(split_heads(self.k(memory), heads), split_heads(self.v(memory), heads))

    def qkv(
        self, x: Float[Tensor, "B L D"], real: Bool[Tensor, "B L"] | None = None
    ) -> tuple[Float[Tensor, "B H L K"], KeyValues, None]:
        """Queries, keys and values of `x`, for self-attention. `real` makes no difference here."""
        return split_heads(self.q(x), self.num_heads), self.project(x), None

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        memory: KeyValues,
        bias: Float[Tensor, "#B #H #L M"] | FactoredBias | None,
    ) -> Float[Tensor, "B L D"]:
        """What each position of `x` reads from `memory`."""
        return self.attend_out(split_heads(self.q(x), self.num_heads), memory, bias)


def split_heads(x: Float[Tensor, "B M HK"], num_heads: int) -> Float[Tensor, "B H M K"]:
    """Each head's share of the columns, as a dimension of its own."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(x: Float[Tensor, "B H L K"]) -> Float[Tensor, "B L HK"]:
    """The heads' columns side by side."""
    return x.transpose(1, 2).flatten(2)
