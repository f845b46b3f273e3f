"""Activation checkpointing per block, with the routing saved and everything else recomputed.

Where two experts are equally likely up to rounding, a recomputation could choose the other one, and
the gradient would belong to another function. So the results of the operations that decide are
saved: some integers per token. Gates and probabilities are recomputed, for they carry gradients.
"""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from switchworks.model import Block, SwitchAttention, SwitchFFN, SwitchTransformer

_ATEN = torch.ops.aten
_DECIDING = (
    *(_ATEN.argmax.default, _ATEN.topk.default, _ATEN.sort.default, _ATEN.sort.stable),
    *(_ATEN.lt.Tensor, _ATEN.lt.Scalar, _ATEN.ge.Scalar),
)
"""The operations by which a routing strategy makes a discrete choice out of real numbers. One of
your own that chooses by another operation has to add it here."""


def checkpoint_blocks(model: SwitchTransformer) -> SwitchTransformer:
    """`model` itself, whose blocks keep their inputs and routes for the backward pass, no more."""
    for stack in (model.encoder, model.decoder):
        if stack is not None:
            stack.call_block = call_checkpointed
    return model


def call_checkpointed(block: Block, *inputs: Any, **named: Any) -> Any:
    """`Stack.call_block` that keeps the inputs and the deciding operations' results."""
    if not torch.is_grad_enabled() or named.get("past") is not None:
        return block(*inputs, **named)
    settings: dict[str, Any] = {"use_reentrant": False}
    if isinstance(block.ffn, SwitchFFN) or isinstance(block.self_attention, SwitchAttention):
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, *inputs, **settings, **named)


def _policy(_context: Any, operation: Any, *_args: Any, **_named: Any) -> CheckpointPolicy:
    keep = operation in _DECIDING
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
