"""Put the fast paths into a model: the one place that knows which module gets which."""

from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from switchworks.fast import experts as grouped
from switchworks.fast import experts_on_gpu as grouped_mm
from switchworks.fast import noise
from switchworks.fast.attention import attend_in_blocks
from switchworks.fast.embedding import look_up
from switchworks.fast.flex import attend_fused
from switchworks.fast.norm import rms_norm
from switchworks.model import (
    DISPATCHERS,
    Attend,
    Attention,
    Embedding,
    Experts,
    RelativeBias,
    RMSNorm,
    SwitchAttention,
    SwitchFFN,
)

M = TypeVar("M", bound=nn.Module)


def use_fast_kernels(model: M, device: torch.device | None = None) -> M:
    """`model` itself, which computes the same as before in other ways.

    `device` is where it will compute; None: where its weights are.

    Weights, their names and all settings stay. Dropout is drawn as before, number for number, but
    for dropout inside experts on a CPU: it and the routers' jitter are of the same distribution
    there (`noise.py`).
    """
    set_attention(model, attend_fused if _kind(model, device) == "cuda" else attend_in_blocks)
    for module in model.modules():
        if isinstance(module, Embedding):
            module.forward = partial(_rows, module)
        elif isinstance(module, RMSNorm):
            module.forward = partial(_norm, module)
        elif isinstance(module, SwitchFFN) and type(module.experts) is Experts:
            _group(module, module.experts, _kind(module, device))
    return model


def set_attention(model: nn.Module, attend: Attend) -> None:
    """All attention of `model` is computed by `attend`, which is given relative biases in parts."""
    for module in model.modules():
        if isinstance(module, Attention | SwitchAttention):
            module.attend = attend
        elif isinstance(module, RelativeBias):
            module.in_parts = True


def _group(layer: SwitchFFN, experts: Experts, kind: str) -> None:
    """No padding: on a processor by counts it reads, on a GPU by counts that stay there."""
    if kind == "cpu":
        layer.dispatcher = DISPATCHERS["sorted"]
        layer.router.jitter = noise.jitter
        experts.forward = partial(grouped.answer, experts)
    elif kind == "cuda" and experts.w_in.dtype == torch.bfloat16:
        layer.dispatcher = grouped_mm.DeviceDispatcher()
        experts.forward = partial(grouped_mm.answer, experts)


def _kind(module: nn.Module, device: torch.device | None) -> str:
    """Of the device that `module` will compute on."""
    return (device or next(module.parameters()).device).type


def _rows(module: Embedding, ids: Tensor) -> Tensor:
    return look_up(module.weight, ids)


def _norm(module: RMSNorm, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, module.epsilon)
