"""Float32 masters of the weights a model keeps in 16 bits.

A bfloat16 number holds 8 bits: beside 1, a step of less than 2 ** -8 rounds to nothing. So the
optimizer moves float32 masters, in which small steps add up, and the model gets rounded copies.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

_NARROW = (torch.bfloat16, torch.float16)


class MasterWeights:
    """A float32 master for every 16-bit parameter; any other parameter is its own master.

    Names are those of `named_parameters()`, where a tied parameter appears once.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Masters start from `weights` where these have a name, else from the parameter.

        A float32 tensor in `weights` becomes the master itself and is changed by training: to keep
        the digits of a float32 model, take them before it is cast, without a copy, by
        `{name: p.detach() for name, p in model.named_parameters()}`.
        """
        weights = weights or {}
        self._parameters = dict(named_parameters)
        self._masters = {
            name: _master_of(parameter, weights.get(name))
            for name, parameter in self._parameters.items()
        }
        self._narrow = [
            name for name, master in self._masters.items() if master is not self._parameters[name]
        ]
        self.publish()

    def named(self) -> dict[str, nn.Parameter]:
        """What an optimizer should update: name -> master."""
        return dict(self._masters)

    def float_state(self) -> dict[str, Tensor]:
        """Name -> full-precision weight, for export and saving. The tensors are not copies."""
        return {name: master.detach() for name, master in self._masters.items()}

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the gradients of the 16-bit parameters to their masters', in float32, and drop them.

        Call after every backward pass. Parameters that are their own master gather theirs in
        float32 as torch does.
        """
        for name in self._narrow:
            parameter, master = self._parameters[name], self._masters[name]
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """Name -> gradient gathered so far, of the masters that have one."""
        return {
            name: master.grad for name, master in self._masters.items() if master.grad is not None
        }

    def zero(self) -> None:
        """Forget all gradients."""
        for name, master in self._masters.items():
            master.grad = None
            self._parameters[name].grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Round every master into the model: one cast per weight."""
        for name in self._narrow:
            self._parameters[name].copy_(self._masters[name])


@torch.no_grad()
def _master_of(parameter: nn.Parameter, weight: Tensor | None) -> nn.Parameter:
    if parameter.dtype in _NARROW:
        value = parameter if weight is None else weight
        return nn.Parameter(value.detach().float(), requires_grad=parameter.requires_grad)
    if weight is not None:
        parameter.copy_(weight)
    return parameter
