"""Products of sorted tokens with the weights of their experts, without padding.

The reference is one product per expert, joined: `Experts` with counts. Here one function holds
all of them, so that autograd keeps one tensor of tokens and not one per expert, and each expert's
gradient is written to its place in one stack: neither is copied, and no cost grows with E squared.

Letters: N tokens sorted by expert, E experts, D width, F hidden width, O width of the answers.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchworks.fast import noise
from switchworks.model import ExpertInput, Experts, activate


def answer(experts: Experts, inbox: ExpertInput) -> Float[Tensor, "N O"]:
    """What `experts` answers to `inbox`. Tokens with a count each go through grouped products;
    equally many for all, and passes without gradients, go the model's own way."""
    tokens, counts = inbox
    if counts is None or isinstance(counts, Tensor) or not torch.is_grad_enabled():
        return Experts.forward(experts, inbox)
    gate = None
    if experts.w_gate is not None:
        gate = grouped_product(tokens, experts.w_gate, counts)
    hidden = activate(grouped_product(tokens, experts.w_in, counts), gate, experts.activation)
    if experts.training and experts.dropout > 0:
        on_cpu = hidden.device.type == "cpu"
        hidden = (noise.dropout if on_cpu else F.dropout)(hidden, experts.dropout)
    return grouped_product(hidden, experts.w_out, counts)


def grouped_product(
    tokens: Float[Tensor, "N D"], weights: Float[Tensor, "E D F"], counts: Sequence[int]
) -> Float[Tensor, "N F"]:
    """Each token times the matrix of its expert; `counts` says how many tokens each expert has."""
    return _GroupedProduct.apply(tokens, weights, counts)


class Spare:
    """Memory of a stack's gradient that was used and is given back, for the next one to take.

    Left to the allocator it would be cut up by what else the backward pass needs, and each next
    stack, the largest tensor there is, would have to be put beside it.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._lent = 0
        """Which memory was taken last."""

    def like(self, stack: Float[Tensor, "E D F"]) -> Float[Tensor, "E D F"]:
        """Any numbers in the shape of `stack`: in what was given back, if that is as large."""
        memory, self._memory = self._memory, None
        if memory is None or memory.numel() != stack.numel() or memory.dtype != stack.dtype:
            memory = torch.empty_like(stack)
        self._lent = memory.untyped_storage()._cdata
        return memory.view(stack.shape)

    def give_back(self, gradient: Tensor) -> None:
        """For who holds the last reference to a gradient; only what was taken last is kept."""
        lent = gradient.untyped_storage()._cdata == self._lent
        if lent and type(gradient) is Tensor:  # and not one that stands for memory in a simulation
            self._memory, self._lent = gradient, 0


spare = Spare()


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Float[Tensor, "N D"], weights: Float[Tensor, "E D F"], counts: Any
    ) -> Float[Tensor, "N F"]:
        ctx.save_for_backward(tokens, weights)
        ctx.counts = counts
        answers = tokens.new_empty(len(tokens), weights.shape[2])
        for expert, rows in _used(counts):
            torch.mm(tokens[rows], weights[expert], out=answers[rows])
        return answers

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
            grad_weights = spare.like(weights)
            for expert, count in enumerate(ctx.counts):
                if not count:
                    grad_weights[expert] = 0
            for expert, rows in _used(ctx.counts):
                torch.mm(tokens[rows].mT, grad_out[rows], out=grad_weights[expert])
        return grad_tokens, grad_weights, None


def _used(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Every expert that has tokens, and which they are."""
    first = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(first, first + count)
        first += count
