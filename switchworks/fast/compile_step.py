"""A model's forward and backward as one graph each, by torch.compile.

What is set here is what was measured to matter with the code that inductor writes for processors;
experiments/speed.md has by how much.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
import torch._functorch.config
from jaxtyping import Float
from torch import Tensor

from switchworks.fast.apply import set_attention
from switchworks.fast.attention import attend_by, spread_diagonals
from switchworks.fast.compiler import require_compiler
from switchworks.model import Output, SharedDropout, SwitchTransformer, attend


def compile_step(model: SwitchTransformer) -> Callable[..., Output]:
    """The forward pass of `model`, compiled at the first call; shapes may not change.

    `model` computes the same as before. Raises torch's errors where it cannot be one graph, and
    ConfigError on a processor without a C++ compiler.
    """
    if next(model.parameters()).device.type == "cpu":
        require_compiler()
    set_attention(model, partial(attend_by, _with_distances_spread))
    graph = torch.compile(model, fullgraph=True, dynamic=False)

    @wraps(model.forward)
    def forward(*args: Any, **named: Any) -> Output:
        # A view that is kept counts as a tensor of its own: beside the answers of a ReLU, which
        # the next product keeps, its mask would be kept too.
        with torch._functorch.config.patch(recompute_views=True):  # pyright: ignore[reportPrivateUsage]
            return graph(*args, **named)

    return forward


def _with_distances_spread(
    q: Float[Tensor, "B H L K"],
    k: Float[Tensor, "B H M K"],
    v: Float[Tensor, "B H M K"],
    distances: Float[Tensor, "H N"] | None,
    hidden: Float[Tensor, "#B #H #L M"] | None,
) -> Float[Tensor, "B H L K"]:
    """The reference, whose relative bias is a view: looking up a bucket for each query and key
    would be fused into the softmax, which would do so three times."""
    bias = None if distances is None else spread_diagonals(distances, k.shape[2])[None]
    if hidden is not None:
        bias = hidden if bias is None else bias + hidden
    return attend(q, k, v, bias, _NO_DROPOUT)


_NO_DROPOUT = SharedDropout(0.0)
