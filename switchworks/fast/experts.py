"""Products of sorted tokens with the weights of their experts, without padding.

The reference is one product per expert, joined: `run_experts`. On a CPU one autograd function holds
all products, so that neither tokens nor gradients are copied, and no cost grows with E squared.
On a GPU it is torch's `grouped_mm`: the host never waits and shapes never change, since all
assignments are sorted, the kept ones first, and those behind are zeros on the way in and out.

Letters: G groups, S tokens per group, N tokens or assignments sorted by expert, E experts, D width,
F hidden width, O width of the outputs.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchworks.model import (
    DISPATCHERS,
    ExpertBank,
    ExpertInput,
    Experts,
    ExpertWeights,
    Routes,
    rows_of,
    run_experts,
)

ALIGNMENT = 16
"""Bytes of which `grouped_mm` wants rows and columns of a weight to be multiples."""


def run_grouped(
    experts: Experts, inputs: ExpertInput, weights: ExpertWeights
) -> Float[Tensor, "N O"]:
    """`Experts.run` by grouped products under gradients, for a list of tokens per expert; else the
    plain form."""
    tokens, counts = inputs
    if counts is None or isinstance(counts, Tensor) or not torch.is_grad_enabled():
        return run_experts(experts, inputs, weights)
    return experts.feed_forward(tokens, weights, partial(grouped_matmul, counts=counts))


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


class DeviceDispatcher:
    """As `sorted_by_expert`, but the counts stay on the device. Experts on other ranks, whose
    counts have to be sent, and widths that the kernel does not take get the dispatcher that a model
    has without this."""

    def __call__(
        self, x: Float[Tensor, "G S D"], routes: Routes, experts: ExpertBank, capacity: int | None
    ) -> Float[Tensor, "G S O"]:
        if not (isinstance(experts, Experts) and aligned(experts)):
            return DISPATCHERS["chosen"](x, routes, experts, capacity)
        groups, size, _ = x.shape
        key = torch.where(routes.kept, routes.expert, experts.num_experts).flatten()
        order = key.argsort(stable=True)
        kept = routes.kept.flatten().index_select(0, order)
        tokens = rows_of(routes, size)
        tokens = order if tokens is None else tokens.index_select(0, order)
        inputs = _only(kept, x.flatten(0, 1).index_select(0, tokens))
        outputs = _only(kept, experts(ExpertInput(inputs, _counts(key, experts.num_experts))))
        gates = routes.gate.flatten().index_select(0, order)
        outputs = outputs * gates[:, None].to(x.dtype)
        empty = outputs.new_zeros(groups * size, outputs.shape[-1])
        return empty.index_add(0, tokens, outputs).view(groups, size, -1)


def run_grouped_mm(
    experts: Experts, inputs: ExpertInput, weights: ExpertWeights
) -> Float[Tensor, "N O"]:
    """`Experts.run` by `grouped_mm`; rows that no count claims may come out as anything."""
    tokens, counts = inputs
    if counts is None or not aligned(experts):
        return run_experts(experts, inputs, weights)
    if not isinstance(counts, Tensor):
        counts = torch.tensor(counts, device=tokens.device)
    ends = counts.cumsum(0, dtype=torch.int32)
    return experts.feed_forward(tokens, weights, partial(F.grouped_mm, offs=ends))


def aligned(experts: Experts) -> bool:
    """Whether `grouped_mm` takes the weights that `experts` have here."""
    weights = list(experts.parameters())
    sizes = [size * weight.element_size() for weight in weights for size in weight.shape[1:]]
    return all(size % ALIGNMENT == 0 for size in sizes)


def _counts(key: Int[Tensor, "N"], experts: int) -> Int[Tensor, "{experts}"]:
    """How many have each key below `experts`. `bincount` would wait for the device to say the
    largest."""
    counts = torch.zeros(experts + 1, dtype=torch.int32, device=key.device)
    return counts.scatter_add_(0, key, torch.ones_like(key, dtype=torch.int32))[:experts]


def _only(kept: Bool[Tensor, "N"], rows: Float[Tensor, "N W"]) -> Float[Tensor, "N W"]:
    """`rows`, with zeros in those not `kept`, whatever they held, and in their gradients."""
    return torch.where(kept[:, None], rows, 0)
