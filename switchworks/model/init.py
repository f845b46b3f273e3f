"""Initial values of every parameter, in one table.

Letters: D model width, F feed-forward width, H heads, K head width; s is `init_scale`.

| parameter                              | distribution                                       |
| -------------------------------------- | -------------------------------------------------- |
| embedding                              | normal, std 1                                      |
| attention q                            | normal, std (D K) ** -0.5                          |
| attention k, v                         | normal, std D ** -0.5                              |
| attention o                            | normal, std (H K) ** -0.5                          |
| FFN and expert w_in, w_gate            | truncated normal, std sqrt(s / D)                  |
| FFN and expert w_out                   | truncated normal, std sqrt(s / F)                  |
| router, untied head                    | truncated normal, std sqrt(s / D)                  |
| relative bias                          | uniform, Glorot over [buckets, H]                  |
| norm scales                            | 1                                                  |
| router's selection bias                | 0                                                  |

Truncation is at two standard deviations and, as in Mesh-TensorFlow, the std is not corrected for
it (the actual one is 0.88 of what the table says). Fan-in never counts the expert dimension.
Sources: the paper's section 2.4; Mesh-TensorFlow's layers.py, attention.py and moe.py.

`attention_init = "aligned"` then changes two rows, for short runs (after mimetic initialisation,
arXiv 2305.09828):
- cross-attention's q is its k times K ** -0.5, so that a decoder position first reads the encoder
  positions that hold the token it holds itself: the target's sentinel finds the input's;
- in half of the heads the relative bias falls off by `SLOPE` per position, down to four times that,
  from one neighbour: -1, +1, -2, +2, ... in the encoder, 0, -1, -2, ... in the decoder.

A value depends on the seed, on the parameter's name and on its place in the parameter. So a dense
model and its sparse twin start from the same values wherever their parameters agree, and a shard
(`fill_shard`) has the values that the full parameter has there.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from switchworks.model.attention import relative_bucket

if TYPE_CHECKING:
    from switchworks.model.config import ModelConfig
    from switchworks.model.switch_ffn import SwitchFFN
    from switchworks.model.transformer import SwitchTransformer


SLOPE = 2.0
"""Nats per position by which an aligned relative bias falls off from its neighbour."""
CHUNK = 2**20
"""Numbers drawn at a time, unless one row has more. Other chunks give other initial values."""


def truncated_normal_(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Fill `weight` with a normal of deviation `std`, redrawing values beyond two deviations."""
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


@torch.no_grad()
def initialise_switch_ffn(
    layer: "SwitchFFN", scale: float, generator: torch.Generator | None = None
) -> None:
    """Initialise the router and experts of `layer`, which is no part of a model, by the table."""
    if layer.router.weight.is_meta:
        return
    for weight in layer.parameters():
        if weight.dim() == 1:
            weight.zero_()  # the selection bias
        else:  # the input width is dimension 1: E D | E D F | E F O
            truncated_normal_(weight, math.sqrt(scale / weight.shape[1]), generator)


@torch.no_grad()
def initialise(model: "SwitchTransformer", seed: int) -> None:
    """Initialise every parameter of `model` in place. Does nothing on the meta device."""
    for name, weight in model.named_parameters():
        if not weight.is_meta:
            fill_shard(weight, name, model.config, seed, weight.shape, (0,) * weight.dim())


@torch.no_grad()
def fill_shard(
    shard: Tensor,
    name: str,
    config: "ModelConfig",
    seed: int,
    shape: Sequence[int],
    offset: Sequence[int],
) -> None:
    """Fill `shard` with the initial values of a range of the parameter `name` of this `shape`.

    `offset` is the first index of the range in each dimension. Every chunk of whole rows has a
    random generator of its own, so no values are skipped to reach the shard, and beside the shard
    there is never more than one chunk in memory.
    """
    if shard.dim() == 1:
        assert name.endswith(("norm.weight", "selection_bias")), name
        shard.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        return
    first, row, column = (0, *offset)[-3:]
    rows, columns = shape[-2:]
    step = max(1, CHUNK // columns)
    starts = range(0, rows, step)
    matrices = shard if shard.dim() == 3 else shard[None]  # a stack has one matrix per expert
    for expert, matrix in enumerate(matrices, start=first):
        for piece, start in enumerate(starts):
            low, high = max(start, row), min(start + step, row + len(matrix))
            if low < high:  # else other ranks have all of the chunk
                size = min(step, rows - start), columns
                chunk = _draw(name, config, (seed, expert * len(starts) + piece), size)
                ours = chunk[low - start : high - start, column : column + matrix.shape[1]]
                matrix[low - row : high - row] = ours


def _draw(
    name: str, config: "ModelConfig", seed: tuple[int, int], shape: tuple[int, int]
) -> Tensor:
    """The chunk of the parameter `name` that has the number `seed[1]`, in float32."""
    aligned = config.attention_init == "aligned"
    if aligned and name.endswith("cross_attention.q.weight"):
        key = name.removesuffix("q.weight") + "k.weight"
        return _draw(key, config, seed, shape) * config.d_kv**-0.5
    # numpy's generator takes a seed of any length. torch's takes 32 bits, of which the million
    # chunks of the largest models would have some twice.
    generator = np.random.default_rng((*seed, *name.encode()))
    kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if kind == "relative_bias":
        limit = math.sqrt(6 / sum(shape))
        bias = torch.from_numpy(generator.uniform(-limit, limit, shape).astype(np.float32))
        return bias - _aligned_slope(name, config) if aligned else bias
    normal = {
        "embedding": 1.0,
        "q": (config.d_model * config.d_kv) ** -0.5,
        "k": config.d_model**-0.5,
        "v": config.d_model**-0.5,
        "o": (config.num_heads * config.d_kv) ** -0.5,
    }
    if kind in normal:
        return torch.from_numpy(generator.standard_normal(shape, np.float32)) * normal[kind]
    assert kind in ("w_in", "w_gate", "w_out", "router", "head"), f"no initial value for {name}"
    width = config.routing.expert_d_ff if config.routing and ".experts." in name else None
    fan_in = width or config.d_ff if kind == "w_out" else config.d_model
    return _standard_truncated_normal(generator, shape) * math.sqrt(config.init_scale / fan_in)


def _standard_truncated_normal(generator: np.random.Generator, shape: tuple[int, int]) -> Tensor:
    """Standard normal values, those beyond two deviations redrawn until none is left."""
    values = generator.standard_normal(math.prod(shape), np.float32)
    beyond = np.flatnonzero(np.abs(values) > 2)
    while len(beyond):
        values[beyond] = generator.standard_normal(len(beyond), np.float32)
        beyond = beyond[np.abs(values[beyond]) > 2]
    return torch.from_numpy(values).view(shape)


def _aligned_slope(name: str, config: "ModelConfig") -> Tensor:
    """What an aligned relative bias is less than T5's, [buckets, H]: in half of the heads the
    nats by which it falls off from one neighbour, in the others 0."""
    bidirectional, far = name.startswith("encoder."), config.relative_max_distance
    distance = torch.arange(-far, far + 1)
    bucket = relative_bucket(distance, bidirectional, config.relative_buckets, far)
    slope = torch.zeros(config.relative_buckets, config.num_heads)
    for head in range(max(1, config.num_heads // 2)):
        step = head // 2 + 1
        neighbour = (-step if head % 2 == 0 else step) if bidirectional else -head
        away = torch.full((config.relative_buckets,), far)
        away.scatter_reduce_(0, bucket, (distance - neighbour).abs(), "amin")
        slope[:, head] = (SLOPE * away).clamp(max=4 * SLOPE)
    return slope
