"""Experts without padding and without synchronising with the host: torch's `grouped_mm`, for GPUs.

Where `experts.py` reads on the host how many tokens each expert has, here the counts stay on the
device, so the GPU never waits and shapes never change: all assignments are sorted, the kept ones
first, and rows behind the last kept one are zeros on the way in and on the way out.

Letters: G groups, S tokens per group, A assignments per group, E experts, N = G * A assignments
sorted by expert, D width, F hidden width, O width of the outputs.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from switchworks.model import (
    DISPATCHERS,
    ExpertBank,
    ExpertInput,
    Experts,
    ExpertWeights,
    Routes,
    activate,
    rows_of,
    run_experts,
)

ALIGNMENT = 16
"""Bytes of which the kernel wants rows and columns of a weight to be multiples."""


class DeviceDispatcher:
    """As `sorted_by_expert`, but the counts stay on the device.

    Experts on other ranks, whose counts have to be sent, and widths that the kernel does not take
    get the dispatcher that a model has without this.
    """

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
    gate = None
    if weights.w_gate is not None:
        gate = F.grouped_mm(tokens, weights.w_gate, offs=ends)
    hidden = activate(F.grouped_mm(tokens, weights.w_in, offs=ends), gate, experts.activation)
    if experts.training and experts.dropout > 0:
        hidden = F.dropout(hidden, experts.dropout)
    return F.grouped_mm(hidden, weights.w_out, offs=ends)


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
