"""A model's forward and backward as one graph each, by torch.compile; applied last.

It sets attention and norms itself: inductor fuses the plain norm, and the hand-written kernels are
opaque to it. experiments/speed.md has what each setting here was measured to bring.
"""

from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any

import torch
import torch._functorch.config
from jaxtyping import Float
from torch import Tensor

from switchworks.config import ConfigError
from switchworks.fast.attention import attend_by, spread_diagonals
from switchworks.fast.kernels import set_attention
from switchworks.fast.seams import reset
from switchworks.model import Output, SharedDropout, SwitchTransformer, attend


def compile_step(model: SwitchTransformer) -> Callable[..., Output]:
    """The forward pass of `model`, compiled at the first call; shapes may not change.

    `model` computes the same as before. Raises torch's errors where it cannot be one graph, and
    ConfigError on a CPU without a C++ compiler.
    """
    if next(model.parameters()).device.type == "cpu":
        require_compiler()
    set_attention(model, partial(attend_by, _attend_factored))
    for module in model.modules():
        reset(module, "normalise")
    for layer in model.switch_layers.values():
        if next(layer.parameters()).device.type == "cpu":
            reset(layer, "dispatcher")  # the fast one reads counts on the host
            reset(layer.experts, "run")
    graph = torch.compile(model, fullgraph=True, dynamic=False)

    @wraps(model.forward)
    def forward(*args: Any, **named: Any) -> Output:
        # A view that is kept counts as a tensor of its own: beside the outputs of a ReLU, which
        # the next product keeps, its mask would be kept too.
        with torch._functorch.config.patch(recompute_views=True):  # pyright: ignore[reportPrivateUsage]
            return graph(*args, **named)

    return forward


def _attend_factored(
    q: Float[Tensor, "B H L K"],
    k: Float[Tensor, "B H M K"],
    v: Float[Tensor, "B H M K"],
    distances: Float[Tensor, "H N"] | None,
    mask: Float[Tensor, "#B #H #L M"] | None,
) -> Float[Tensor, "B H L K"]:
    """The reference with the relative bias as a view of its distances: looking up a bucket for
    each query and key would be fused into the softmax, which would do so three times."""
    bias = None if distances is None else spread_diagonals(distances, k.shape[2])[None]
    if mask is not None:
        bias = mask if bias is None else bias + mask
    return attend(q, k, v, bias, _NO_DROPOUT)


_NO_DROPOUT = SharedDropout(0.0)


@cache
def require_compiler() -> None:
    """Raises ConfigError if there is none, before minutes are spent on the way to it."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            f"Compiling for a CPU takes a C++ compiler: {error}.\n"
            "  Install g++, name another in the environment's CXX, or leave compiling out."
        ) from error
