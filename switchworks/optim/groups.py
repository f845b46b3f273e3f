"""Parameters in groups that an optimizer treats alike, told apart by their dimension letters.

docs/numerics.md has the table. A parameter without letters is a vector, a matrix or a tensor by its
number of dimensions.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from switchworks.optim.config import OptimConfig

Kind = Literal[
    "matrix", "experts", "embedding", "router", "vector", "relative_bias", "adapter", "tensor"
]


class ParameterGroup(NamedTuple):
    """Parameters of one kind, and how fast they move."""

    kind: Kind
    stacked: bool
    """Whether the first dimension counts experts."""
    parameters: list[nn.Parameter]
    weight_decay: float
    rate: float = 1.0
    """Factor on the learning rate of the step."""

    def settings(self) -> dict[str, Any]:
        """The group as a torch optimizer takes it. The Updater reads "rate" at every step."""
        return {"params": self.parameters, "weight_decay": self.weight_decay, "rate": self.rate}


def group_parameters(
    parameters: Mapping[str, nn.Parameter], letters: Mapping[str, str], config: OptimConfig
) -> list[ParameterGroup]:
    """The parameters that require gradients, in groups, with the rates and decays of `config`."""
    groups: dict[tuple[Kind, bool], ParameterGroup] = {}
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        dims = letters.get(name, "").split()
        kind, stacked = _kind(parameter, dims), _is_stack(dims)
        no_decay = kind in ("vector", "relative_bias")
        group = ParameterGroup(
            kind,
            stacked,
            parameters=[],
            weight_decay=0.0 if no_decay else config.weight_decay,
            rate=config.router_lr if kind == "router" else 1.0,
        )
        groups.setdefault((kind, stacked), group).parameters.append(parameter)
    return list(groups.values())


def dimension_letters(model: nn.Module) -> dict[str, str]:
    """Full parameter name -> dimension letters, collected from the modules' `letters`."""
    known = {name for name, _ in model.named_parameters()}
    letters = {
        f"{prefix}.{name}" if prefix else name: dims
        for prefix, module in model.named_modules()
        for name, dims in getattr(module, "letters", {}).items()
    }
    return {name: dims for name, dims in letters.items() if name in known}


def _kind(parameter: Tensor, dims: list[str]) -> Kind:
    if "R" in dims:
        return "adapter"
    if "_" in dims:
        return "relative_bias"
    if parameter.dim() < 2:
        return "vector"
    if dims[:1] == ["E"]:
        return "experts" if _is_stack(dims) else "router"
    if "V" in dims:
        return "embedding"
    return "matrix" if parameter.dim() == 2 else "tensor"


def _is_stack(dims: list[str]) -> bool:
    return len(dims) > 2 and dims[0] == "E"
