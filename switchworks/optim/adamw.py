"""AdamW: torch's fused one."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from switchworks.optim.config import OptimConfig
from switchworks.optim.groups import ParameterGroup


def build_adamw(
    groups: Sequence[ParameterGroup], config: OptimConfig
) -> list[torch.optim.Optimizer]:
    """torch.optim.AdamW for `groups`, with its state made now, so that it can be loaded into."""
    param_groups = [
        group._replace(parameters=parameters).settings()
        for group in groups
        for parameters in _by_mesh(group.parameters)
    ]
    beta1, beta2 = config.betas
    optimizer = torch.optim.AdamW(
        param_groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
    return [optimizer]


def _by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """`parameters` by device mesh: a fused update takes plain tensors, or DTensors of one mesh."""
    lists: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        lists.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(lists.values())
