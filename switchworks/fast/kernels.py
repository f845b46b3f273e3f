"""Which fast form each module of a model gets, and where it is used unless told otherwise."""

from typing import Literal, TypeVar

import torch
from torch import nn

from switchworks.fast.attention import attend_in_blocks
from switchworks.fast.experts import run_grouped
from switchworks.fast.experts_on_gpu import DeviceDispatcher, run_grouped_mm
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
Kernels = Literal["auto", "reference", "fast"]


def use_kernels(
    model: M,
    kernels: Kernels,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    training: bool = True,
) -> M:
    """`model` itself, with the fast kernels if `kernels`, see `resolve_kernels`, comes to that.

    `device` and `dtype` are those it will compute with; None: those of its weights.
    """
    weight = next(model.parameters())
    device, dtype = device or weight.device, dtype or weight.dtype
    sparse = any(isinstance(module, SwitchFFN) for module in model.modules())
    if resolve_kernels(kernels, device, dtype, sparse=sparse, training=training) == "fast":
        use_fast_kernels(model, device)
    return model


def resolve_kernels(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, *, sparse: bool, training: bool
) -> Literal["reference", "fast"]:
    """ "auto" as the set that was measured faster (docs/speed.md), the reference where none was.

    In float32 on CPUs a training step with experts takes 0.955 of its time with the fast kernels
    and a dense one 1.02 to 1.05. They change nothing without gradients. bfloat16 with instructions
    for it and GPUs have not been measured.
    """
    if kernels != "auto":
        return kernels
    measured_faster = device.type == "cpu" and dtype == torch.float32 and sparse and training
    return "fast" if measured_faster else "reference"


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
            module.factored = True


def _set_experts(layer: SwitchFFN, experts: Experts, kind: str) -> None:
    """No padding: on a CPU by counts read on the host, on a GPU by counts that stay there."""
    if kind == "cpu":
        layer.dispatcher, experts.run = DISPATCHERS["sorted"], run_grouped
    elif kind == "cuda" and experts.w_in.dtype == torch.bfloat16:
        layer.dispatcher, experts.run = DeviceDispatcher(), run_grouped_mm
