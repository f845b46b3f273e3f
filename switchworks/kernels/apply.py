"""Put the fast paths into a model: the one place that knows which module gets which."""

from functools import partial
from typing import TypeVar

from torch import Tensor, nn

from switchworks.kernels import grouped
from switchworks.kernels.attention import attend_in_blocks
from switchworks.kernels.norm import rms_norm
from switchworks.model.attention import Attention, RelativeBias
from switchworks.model.dispatch import DISPATCHERS
from switchworks.model.experts import Experts
from switchworks.model.layers import RMSNorm
from switchworks.model.switch_attention import SwitchAttention
from switchworks.model.switch_ffn import SwitchFFN

M = TypeVar("M", bound=nn.Module)


def apply(model: M) -> M:
    """`model` itself, which computes the same as before in other ways.

    Weights, their names and all settings stay. What is noise in the model (dropout, jitter) is
    drawn as before, number for number, but for dropout inside experts on a CPU: tokens are
    sorted there and not padded, so it is drawn as for the sorted dispatcher.
    """
    for module in model.modules():
        if isinstance(module, Attention | SwitchAttention):
            module.attend = attend_in_blocks
        elif isinstance(module, RelativeBias):
            module.in_parts = True
        elif isinstance(module, RMSNorm):
            module.forward = partial(_norm, module)
        elif isinstance(module, SwitchFFN) and _alone_on_cpu(module.experts):
            module.dispatcher = DISPATCHERS["sorted"]
            module.experts.forward = partial(grouped.answer, module.experts)
    return model


def _alone_on_cpu(experts: nn.Module) -> bool:
    """Where padding costs more than reading counts does, and where experts are the model's own."""
    return type(experts) is Experts and experts.w_in.device.type == "cpu"


def _norm(module: RMSNorm, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, module.epsilon)
