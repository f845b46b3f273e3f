"""Which fast form each module of a model gets."""

from typing import TypeVar

import torch
from torch import nn

from switchworks.fast.attention import attend_in_blocks, factored
from switchworks.fast.experts import DeviceDispatcher, run_grouped, run_grouped_mm
from switchworks.fast.flex import attend_fused
from switchworks.fast.norm import rms_norm
from switchworks.model import (
    DISPATCHERS,
    Attend,
    AttentionBase,
    Experts,
    RelativeBias,
    RMSNorm,
    SwitchFFN,
)

M = TypeVar("M", bound=nn.Module)


def use_fast_kernels(model: M, device: torch.device | None = None) -> M:
    """`model` itself, computing the same in other ways; it draws the same dropout and jitter.

    `device` is where it will compute; None: where its weights are. Weights, their names and all
    settings stay.
    """
    kind = (device or next(model.parameters()).device).type
    set_attention(model, attend_fused if kind == "cuda" else attend_in_blocks)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.normalise = rms_norm
        elif isinstance(module, SwitchFFN) and type(module.experts) is Experts:
            _set_experts(module, module.experts, kind)
    return model


def set_attention(model: nn.Module, attend: Attend) -> None:
    """All attention of `model` is computed by `attend`, which gets relative biases as factors."""
    for module in model.modules():
        if isinstance(module, AttentionBase):
            module.attend = attend
        elif isinstance(module, RelativeBias):
            module.form = factored


def _set_experts(layer: SwitchFFN, experts: Experts, kind: str) -> None:
    """No padding: on a CPU by counts read on the host, on a GPU by counts that stay there."""
    if kind == "cpu":
        layer.dispatcher, experts.run = DISPATCHERS["sorted"], run_grouped
    elif kind == "cuda" and experts.w_in.dtype == torch.bfloat16:
        layer.dispatcher, experts.run = DeviceDispatcher(), run_grouped_mm
