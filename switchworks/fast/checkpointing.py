"""Activation checkpointing per block, with the routing saved and everything else computed again.

Noise (dropout, jitter) is drawn again from the same state of the generator, so it is the same.
That alone would not keep the routing: where two experts are equally likely up to rounding, a
second pass could choose the other one and the gradient would belong to another function. So what
decides (the largest score, the order of service, a coin against a gate) is kept: some integers per
token. Gates and router probabilities are computed again, for they carry gradients.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from switchworks.model import Block, SwitchAttention, SwitchFFN, SwitchTransformer

_DECIDE = frozenset(
    {
        torch.ops.aten.argmax.default,
        torch.ops.aten.sort.default,
        torch.ops.aten.sort.stable,
        torch.ops.aten.lt.Tensor,
        torch.ops.aten.lt.Scalar,
        torch.ops.aten.ge.Scalar,
    }
)
"""The operations by which a routing strategy makes a discrete choice out of real numbers."""


def checkpoint_blocks(model: SwitchTransformer) -> SwitchTransformer:
    """`model` itself, whose blocks keep their inputs and routes for the backward pass, no more.

    Loss, gradients, weights and their names stay. Nothing changes where no gradient is asked for.
    """
    for stack in (model.encoder, model.decoder):
        for block in stack or ():
            block.forward = partial(_forward, block)
    return model


def _forward(block: Block, *inputs: Any, **more: Any) -> Any:
    if not torch.is_grad_enabled() or more.get("past") is not None:
        return Block.forward(block, *inputs, **more)
    settings: dict[str, Any] = {"use_reentrant": False}
    if isinstance(block.ffn, SwitchFFN) or isinstance(block.self_attention, SwitchAttention):
        settings["context_fn"] = _keeping_routing
    return checkpoint(partial(Block.forward, block), *inputs, **settings, **more)


class _Keep(TorchDispatchMode):
    """Notes what was decided, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.decided: list[Any] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        made = operation(*args, **(kwargs or {}))
        if operation in _DECIDE:
            self.decided.append(tree_map_only(Tensor, Tensor.detach, made))
        return made


class _Repeat(TorchDispatchMode):
    """Decides as before. All other operations run, whatever they are: on a mesh the second time
    weights may have to be gathered that were there the first time."""

    def __init__(self, kept: _Keep) -> None:
        super().__init__()
        self.kept = kept
        self.next = 0

    def __enter__(self) -> "_Repeat":
        self.next = 0
        return super().__enter__()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if operation not in _DECIDE:
            return operation(*args, **(kwargs or {}))
        self.next += 1
        return tree_map_only(Tensor, Tensor.detach, self.kept.decided[self.next - 1])


def _keeping_routing() -> tuple[_Keep, _Repeat]:
    """For the first time a block is computed and for the second."""
    kept = _Keep()
    return kept, _Repeat(kept)
