"""Put the fast paths into a model: the one place that knows which module gets which."""

from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from switchworks.kernels import grouped, noise
from switchworks.kernels.attention import attend_in_blocks
from switchworks.kernels.embedding import look_up
from switchworks.kernels.norm import rms_norm
from switchworks.model.attention import Attention, RelativeBias
from switchworks.model.dispatch import DISPATCHERS
from switchworks.model.experts import Experts
from switchworks.model.layers import Embedding, RMSNorm
from switchworks.model.switch_attention import SwitchAttention
from switchworks.model.switch_ffn import SwitchFFN

M = TypeVar("M", bound=nn.Module)


def apply(model: M, device: torch.device | None = None) -> M:
    """`model` itself, which computes the same as before in other ways.

    `device` is where it will compute; None: where its weights are.

    Weights, their names and all settings stay. Dropout is drawn as before, number for number, but
    for dropout inside experts on a CPU: it and the routers' jitter are of the same distribution
    there (`noise.py`).
    """
    for module in model.modules():
        if isinstance(module, Attention | SwitchAttention):
            module.attend = attend_in_blocks
        elif isinstance(module, RelativeBias):
            module.in_parts = True
        elif isinstance(module, Embedding):
            module.forward = partial(_rows, module)
        elif isinstance(module, RMSNorm):
            module.forward = partial(_norm, module)
        elif isinstance(module, SwitchFFN) and _own_on_cpu(module.experts, device):
            module.dispatcher = DISPATCHERS["sorted"]
            module.router.jitter = noise.jitter
            module.experts.forward = partial(grouped.answer, module.experts)
    return model


def _own_on_cpu(experts: nn.Module, device: torch.device | None) -> bool:
    """Where padding costs more than reading counts does, and where experts are the model's own."""
    return type(experts) is Experts and (device or experts.w_in.device).type == "cpu"


def _rows(module: Embedding, ids: Tensor) -> Tensor:
    return look_up(module.weight, ids)


def _norm(module: RMSNorm, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, module.epsilon)
