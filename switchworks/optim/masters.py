"""Float32 masters of the weights a model keeps in 16 bits.

A bfloat16 number has 8 significant bits: a step from 1 of less than 2 ** -8 rounds to nothing. So
the optimizer updates float32 masters, in which small steps add up, and the model gets rounded
copies.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from switchworks.optim.sharded_stats import local

_HALF = (torch.bfloat16, torch.float16)
_SMALL, _BUCKET = 2**16, 2**24
"""Elements of a small parameter at most, and of a bucket of large ones (64 MB in float32)."""


class MasterWeights:
    """A float32 master for every 16-bit parameter; any other parameter is its own master. Names are
    those of `named_parameters()`, where a tied parameter appears once."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Masters start from `weights` where these have the name, else from the parameter. A
        float32 tensor in `weights` becomes the master itself and is changed by training: to keep
        the digits of a float32 model, take them before it is cast, without a copy, by `{name:
        p.detach() for name, p in model.named_parameters()}`."""
        weights = weights or {}
        self.parameters = dict(named_parameters)
        """Name -> parameter, which the model computes with."""
        self.named = {
            name: _master_of(parameter, weights.get(name))
            for name, parameter in self.parameters.items()
        }
        """Name -> master, which the optimizer updates."""
        self._half = [
            name for name, master in self.named.items() if master is not self.parameters[name]
        ]
        self.copy_to_model()

    def float_state(self) -> dict[str, Tensor]:
        """Name -> full-precision weight, for export and saving. The tensors are not copies."""
        return {name: master.detach() for name, master in self.named.items()}

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the gradients of the 16-bit parameters to their masters', in float32, and drop them.

        Call after every backward pass. For parameters that are their own master autograd itself
        accumulates in float32.
        """
        for name in self._half:
            parameter, master = self.parameters[name], self.named[name]
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    @property
    def accumulating(self) -> bool:
        """Whether masters of 16-bit parameters have gradients."""
        return any(self.named[name].grad is not None for name in self._half)

    def gradients(self) -> dict[str, Tensor]:
        """Name -> accumulated gradient, where there is one; before `accumulate`, the parameter's
        own, in 16 bits."""
        gradients: dict[str, Tensor] = {}
        for name, master in self.named.items():
            grad = self.parameters[name].grad if master.grad is None else master.grad
            if grad is not None:
                gradients[name] = grad
        return gradients

    def buckets(self) -> list[list[str]]:
        """All names in a few lists, to be updated one list after the other.

        The first list has what needs no float32 copy of its gradient and all that is small; the
        others large 16-bit parameters, about 64 MB of float32 gradients in each. After
        `accumulate` there is one list.
        """
        # An optimizer updates every master that has a gradient. Once all of them have one there
        # is nothing to save, and a second list would be updated along with the first.
        if self.accumulating:
            return [list(self.named)]
        large = [name for name in self._half if self.named[name].numel() > _SMALL]
        buckets, size = [[name for name in self.named if name not in set(large)]], _BUCKET
        for name in large:
            if size >= _BUCKET:
                buckets.append([])
                size = 0
            buckets[-1].append(name)
            size += self.named[name].numel()
        return buckets

    @torch.no_grad()
    def prepare_grads(self, names: Iterable[str], scale: float) -> None:
        """Give the masters of `names` their gradients in float32, times `scale`."""
        for name in names:
            parameter, master = self.parameters[name], self.named[name]
            if parameter is not master and parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.to(master.dtype), None
            if scale != 1 and master.grad is not None:
                local(master.grad).mul_(scale)

    def zero(self, names: Iterable[str] | None = None) -> None:
        """Drop the gradients of `names`, or all."""
        for name in self.named if names is None else names:
            self.named[name].grad = None
            self.parameters[name].grad = None

    @torch.no_grad()
    def copy_to_model(self, names: Iterable[str] | None = None) -> None:
        """Round the masters of `names`, or all, into the model: one cast per weight."""
        for name in self.named if names is None else names:
            parameter, master = self.parameters[name], self.named[name]
            if parameter is not master:
                parameter.copy_(master)


@torch.no_grad()
def _master_of(parameter: nn.Parameter, weight: Tensor | None) -> nn.Parameter:
    if parameter.dtype in _HALF:
        value = parameter if weight is None else weight
        return nn.Parameter(value.detach().float(), requires_grad=parameter.requires_grad)
    if weight is not None:
        parameter.copy_(weight)
    return parameter
