"""Every parameter's first value, in one table.

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

A parameter's values depend on the seed and on its name, not on the order of construction, so a
dense model and its sparse twin start from the same values wherever their parameters agree.
"""

import math
import zlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from switchworks.model.attention import relative_bucket

if TYPE_CHECKING:
    from switchworks.model.attention import RelativeBias
    from switchworks.model.config import ModelConfig
    from switchworks.model.switch_ffn import SwitchFFN
    from switchworks.model.transformer import SwitchTransformer


SLOPE = 2.0
"""Nats per position by which an aligned relative bias falls off from its neighbour."""
PIECE = 2**20
"""Numbers drawn again at a time; a stack of experts is many times that."""


def truncated_normal_(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Fill `weight` with a normal of deviation `std`, values beyond two of them drawn again.

    On a processor the numbers of `torch.nn.init.trunc_normal_`, which draws as many as there are
    in each round and holds `weight` three times. Sixteen numbers come of each other, so pieces are
    whole rows where a row is a multiple of that.
    """
    row = weight[0].numel()
    pieces = weight.split(len(weight) if row % 16 else max(1, PIECE // row))
    weight.normal_(std=std, generator=generator)
    while any((piece.abs() > 2 * std).any() for piece in pieces):
        for piece in pieces:
            again = torch.empty_like(piece).normal_(std=std, generator=generator)
            piece.copy_(torch.where(piece.abs() > 2 * std, again, piece))


def initialise_switch_ffn(
    layer: "SwitchFFN", scale: float, generator: torch.Generator | None = None
) -> None:
    """Give router and experts of `layer` their first values, by the table above."""
    if layer.router.weight.is_meta:
        return
    with torch.no_grad():
        for weight in layer.parameters():
            if weight.dim() == 1:
                weight.zero_()  # the selection bias
            else:  # fan-in stands second: E D | E D F | E F O
                truncated_normal_(weight, math.sqrt(scale / weight.shape[1]), generator)


@torch.no_grad()
def initialise(model: "SwitchTransformer", seed: int) -> None:
    """Give every parameter of `model` its first value. Does nothing on the meta device."""
    for name, weight in model.named_parameters():
        if not weight.is_meta:
            own = seed + zlib.crc32(name.encode())
            _fill(name, weight, model.config, torch.Generator(weight.device).manual_seed(own))
    if model.config.attention_init == "aligned" and not model.embedding.weight.is_meta:
        _align(model)


def _fill(name: str, weight: Tensor, config: "ModelConfig", generator: torch.Generator) -> None:
    kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
    normal = {
        "embedding": 1.0,
        "q": (config.d_model * config.d_kv) ** -0.5,
        "k": config.d_model**-0.5,
        "v": config.d_model**-0.5,
        "o": (config.num_heads * config.d_kv) ** -0.5,
    }
    if kind in normal:
        weight.normal_(std=normal[kind], generator=generator)
    elif kind in ("w_in", "w_gate", "w_out", "router", "head"):
        fan_in = config.d_ff if kind == "w_out" else config.d_model
        truncated_normal_(weight, math.sqrt(config.init_scale / fan_in), generator)
    elif kind == "relative_bias":
        limit = math.sqrt(6 / sum(weight.shape))
        weight.uniform_(-limit, limit, generator=generator)
    elif kind.endswith("norm"):
        weight.fill_(1.0)
    elif kind == "selection_bias":
        weight.zero_()
    else:
        raise AssertionError(f"no first value is defined for {name}")


def _align(model: "SwitchTransformer") -> None:
    """The two changes of `attention_init = "aligned"`."""
    for block in model.decoder:
        if block.cross_attention is not None:
            key = block.cross_attention.k.weight
            block.cross_attention.q.weight.copy_(key * model.config.d_kv**-0.5)
    for stack in (model.encoder, model.decoder):
        if stack is not None:
            _prefer_neighbours(stack.relative_bias)


def _prefer_neighbours(bias: "RelativeBias") -> None:
    """Half of the heads begin with one neighbour each."""
    buckets, heads = bias.weight.shape
    far = bias.max_distance
    distance = torch.arange(-far, far + 1)
    bucket = relative_bucket(
        distance[None], bidirectional=bias.bidirectional, buckets=buckets, max_distance=far
    )[0]
    for head in range(max(1, heads // 2)):
        step = head // 2 + 1
        neighbour = (-step if head % 2 == 0 else step) if bias.bidirectional else -head
        away = torch.full((buckets,), far)
        away.scatter_reduce_(0, bucket, (distance - neighbour).abs(), "amin")
        fall = (SLOPE * away).clamp(max=4 * SLOPE)
        bias.weight[:, head] -= fall.to(bias.weight)
