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
from switchworks.model.layers import Linear, SharedDropout, look_up, to_float32

MASKED = -1e9
"""Added to the score of a key that must not be seen. Finite, so that a query which sees no key
at all (a padded row) gets a meaningless average and not NaN."""


def relative_bucket(
    distance: Int[Tensor, "*b"], bidirectional: bool, buckets: int, max_distance: int
) -> Int[Tensor, "*b"]:
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


Bias = Any
"""[#B, #H, L, M], added to scores: a tensor, or what else a mask can be added to and the layers'
`attend` takes (`fast.attention.FactoredBias`)."""


class PositionEncoding(nn.Module):
    """How the self-attention of a stack knows where its tokens stand: one module per stack.

    It adds a bias to the scores, turns queries and keys, or both. Cached decoding relies on a score
    depending on the distance of query and key alone.
    """

    def forward(self, num_queries: int, num_keys: int, first: int = 0) -> Bias:
        """[1, #H, L, M], added to scores: queries from position `first` on, keys from 0 on."""
        raise NotImplementedError

    def rotate(
        self, x: Float[Tensor, "B H L K"], first: int | Int[Tensor, "B 1 1"]
    ) -> Float[Tensor, "B H L K"]:
        """Queries or keys at positions first, first + 1, ... of their row, before scores."""
        return x


def spread(positions: "RelativeBias", num_queries: int, num_keys: int, first: int) -> Bias:
    """The bias [1, H, L, M] itself; the plain form of `RelativeBias.form`."""
    device = positions.weight.device
    queries = torch.arange(first, first + num_queries, device=device)
    keys = torch.arange(num_keys, device=device)
    return positions.by_distance(keys[None] - queries[:, None])[None]


class RelativeBias(PositionEncoding):
    """A learned number per head and distance bucket, added to self-attention's scores (T5)."""

    letters = {"weight": "_ H"}
    form: Callable[["RelativeBias", int, int, int], Bias] = staticmethod(spread)
    look_up: Callable[[Tensor, Tensor], Tensor] = staticmethod(look_up)

    def __init__(self, config: ModelConfig, *, bidirectional: bool) -> None:
        super().__init__()
        self.bidirectional = bidirectional
        self.max_distance = config.relative_max_distance
        self.weight = nn.Parameter(torch.empty(config.relative_buckets, config.num_heads))

    def forward(self, num_queries: int, num_keys: int, first: int = 0) -> Bias:
        """The bias [1, H, L, M] of queries from position `first` on and keys from 0 on."""
        return self.form(self, num_queries, num_keys, first)

    def by_distance(self, distances: Int[Tensor, "L M"]) -> Float[Tensor, "H L M"]:
        """The learned numbers for these distances between query and key."""
        buckets = self.weight.shape[0]
        bucket = relative_bucket(distances, self.bidirectional, buckets, self.max_distance)
        return self.look_up(self.weight, bucket).permute(2, 0, 1)


def segment_mask(
    query_segments: Int[Tensor, "B L"], key_segments: Int[Tensor, "B M"]
) -> Bool[Tensor, "B 1 L M"]:
    """True where query and key belong to the same example. Padding is segment 0, so no real
    query sees a padding key."""
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
    scores = q @ k.mT if bias is None else q @ k.mT + bias
    weights = to_float32(scores).softmax(dim=-1).to(q.dtype)
    return dropout(weights) @ v


Attend = Callable[[Tensor, Tensor, Tensor, Any, SharedDropout], Tensor]
"""`attend`, or a faster form of it that may take another `Bias` too."""


class KeyValues(NamedTuple):
    """Keys and values of one attention layer."""

    k: Float[Tensor, "B H M K"]
    v: Float[Tensor, "B H M K"]


class AttentionBase(nn.Module):
    """What attention and switch attention share: scores, weighted values and the output matrix."""

    attend: Attend = staticmethod(attend)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.d_kv = config.d_kv
        self.o = Linear(config.num_heads * config.d_kv, config.d_model)
        self.dropout = SharedDropout(config.dropout)

    def attend_out(
        self, query: Float[Tensor, "B H L K"], memory: KeyValues, bias: Bias | None
    ) -> Float[Tensor, "B L D"]:
        """The weighted values of `memory` for each query, heads joined and mixed by `o`."""
        heads = self.attend(query, memory.k, memory.v, bias, self.dropout)
        return self.o(heads.transpose(1, 2).flatten(2))

    def split_heads(self, x: Float[Tensor, "B M HK"]) -> Float[Tensor, "B H M K"]:
        """The columns of each head. On a mesh `x` has this rank's heads, so their number is not
        that of the config."""
        return x.unflatten(-1, (-1, self.d_kv)).transpose(1, 2)


class Attention(AttentionBase):
    """Multi-head attention from `x` to `memory`. H in the letters stands for H * K rows."""

    letters = {"q.weight": "H D", "k.weight": "H D", "v.weight": "H D", "o.weight": "D H"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        inner = config.num_heads * config.d_kv
        self.q = Linear(config.d_model, inner)
        self.k = Linear(config.d_model, inner)
        self.v = Linear(config.d_model, inner)

    def project(self, memory: Float[Tensor, "B M D"]) -> KeyValues:
        """The keys and values of `memory`."""
        return KeyValues(self.split_heads(self.k(memory)), self.split_heads(self.v(memory)))

    def qkv(
        self, x: Float[Tensor, "B L D"], real: Bool[Tensor, "B L"] | None = None
    ) -> tuple[Float[Tensor, "B H L K"], KeyValues, None]:
        """Queries, keys and values of `x`, for self-attention. `real` makes no difference here."""
        return self.split_heads(self.q(x)), self.project(x), None

    def forward(
        self, x: Float[Tensor, "B L D"], memory: KeyValues, bias: Bias | None
    ) -> Float[Tensor, "B L D"]:
        """Cross-attention: the weighted values of `memory` for each position of `x`."""
        return self.attend_out(self.split_heads(self.q(x)), memory, bias)
