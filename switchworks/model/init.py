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

A parameter's values depend on the seed and on its name, not on the order of construction, so a
dense model and its sparse twin start from the same values wherever their parameters agree.
"""

import math
import zlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from switchworks.model.switch_ffn import SwitchFFN
    from switchworks.model.transformer import SwitchTransformer


def truncated_normal_(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Fill `weight` with a normal of deviation `std`, values beyond two of them drawn again."""
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


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
                continue
            fan_in = weight.shape[1]  # E D | E D F | E F O
            truncated_normal_(weight, math.sqrt(scale / fan_in), generator)


def initialise(model: "SwitchTransformer", seed: int) -> None:
    """Give every parameter of `model` its first value. Does nothing on the meta device."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_meta:
                generator = torch.Generator(parameter.device)
                generator.manual_seed(seed + zlib.crc32(name.encode()))
                _fill(name, parameter, model, generator)


def _fill(
    name: str, weight: Tensor, model: "SwitchTransformer", generator: torch.Generator
) -> None:
    config = model.config
    kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
    inner = config.num_heads * config.d_kv
    normal = {
        "embedding": 1.0,
        "q": (config.d_model * config.d_kv) ** -0.5,
        "k": config.d_model**-0.5,
        "v": config.d_model**-0.5,
        "o": inner**-0.5,
    }
    if kind in normal:
        weight.normal_(std=normal[kind], generator=generator)
    elif kind in ("w_in", "w_gate", "router", "head"):
        truncated_normal_(weight, math.sqrt(config.init_scale / config.d_model), generator)
    elif kind == "w_out":
        truncated_normal_(weight, math.sqrt(config.init_scale / config.d_ff), generator)
    elif kind == "relative_bias":
        limit = math.sqrt(6 / sum(weight.shape))
        weight.uniform_(-limit, limit, generator=generator)
    elif kind.endswith("norm"):
        weight.fill_(1.0)
    elif kind == "selection_bias":
        weight.zero_()
    else:
        raise AssertionError(f"no first value is defined for {name}")
