"""Products of sorted tokens with the weights of their experts, without padding.

The reference is one product per expert, joined: `run_experts`. Here one autograd function holds
all of them, so that one tensor of tokens is kept and not one per expert, and each expert's gradient
is written to its place in one stack: neither is copied, and no cost grows with E squared.

Letters: N tokens sorted by expert, E experts, D width, F hidden width, O width of the outputs.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchworks.model import ExpertInput, Experts, ExpertWeights, activate, run_experts


def run_grouped(
    experts: Experts, inputs: ExpertInput, weights: ExpertWeights
) -> Float[Tensor, "N O"]:
    """`Experts.run` by grouped products under gradients, for a list of tokens per expert; else the
    plain form."""
    tokens, counts = inputs
    if counts is None or isinstance(counts, Tensor) or not torch.is_grad_enabled():
        return run_experts(experts, inputs, weights)
    gate = None
    if weights.w_gate is not None:
        gate = grouped_matmul(tokens, weights.w_gate, counts)
    hidden = activate(grouped_matmul(tokens, weights.w_in, counts), gate, experts.activation)
    if experts.training and experts.dropout > 0:
        hidden = F.dropout(hidden, experts.dropout)
    return grouped_matmul(hidden, weights.w_out, counts)


def grouped_matmul(
    tokens: Float[Tensor, "N D"], weights: Float[Tensor, "E D F"], counts: Sequence[int]
) -> Float[Tensor, "N F"]:
    """Each token times the matrix of its expert; `counts` are the tokens per expert."""
    return _GroupedMatmul.apply(tokens, weights, counts)


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Float[Tensor, "N D"], weights: Float[Tensor, "E D F"], counts: Any
    ) -> Float[Tensor, "N F"]:
        ctx.save_for_backward(tokens, weights)
        ctx.counts = counts
        outputs = tokens.new_empty(len(tokens), weights.shape[2])
        for expert, rows in _used(counts):
            torch.mm(tokens[rows], weights[expert], out=outputs[rows])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Float[Tensor, "N F"]
    ) -> tuple[Float[Tensor, "N D"] | None, Float[Tensor, "E D F"] | None, None]:
        tokens, weights = ctx.saved_tensors
        grad_tokens, grad_weights = None, None
        if ctx.needs_input_grad[0]:
            grad_tokens = torch.empty_like(tokens)
            for expert, rows in _used(ctx.counts):
                torch.mm(grad_out[rows], weights[expert].mT, out=grad_tokens[rows])
        if ctx.needs_input_grad[1]:
            # Written in place, expert by expert: a `cat` of E gradients would copy the stack.
            grad_weights = torch.empty_like(weights)
            for expert, count in enumerate(ctx.counts):
                if not count:
                    grad_weights[expert] = 0
            for expert, rows in _used(ctx.counts):
                torch.mm(tokens[rows].mT, grad_out[rows], out=grad_weights[expert])
        return grad_tokens, grad_weights, None


def _used(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Every expert that has tokens, and the rows of its tokens."""
    first = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(first, first + count)
        first += count
