"""The experts: E feed-forward networks in stacked weights, and two ways to run them.

Tokens reach them sorted by expert. Each expert gets either the same number of them (slots padded to
a capacity: one batched product) or its own (one product per expert, no padding). Both give the same
numbers; the tests hold each to `Experts.run_one`.

Letters: E experts, N tokens sorted by expert, C tokens of one expert, D width, F hidden width,
O width of the outputs (D but in switch attention).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from switchworks.model.config import check_activation
from switchworks.model.layers import Matmul, activate


class ExpertInput(NamedTuple):
    """Tokens sorted by expert."""

    tokens: Float[Tensor, "N D"]
    tokens_per_expert: Sequence[int] | Int[Tensor, "E"] | None
    """None: N / E each. A tensor, which may not be read on the host, comes only to kernels that
    take one: its sum may be below N, and the rows behind are zeros."""


class ExpertWeights(NamedTuple):
    """The stacks of all experts [E, inputs, outputs], or the matrices of one [inputs, outputs].

    Tensors, or what else has `select`, `unbind` and `shape` and suits `Experts.matmul`.
    """

    w_in: Any
    w_gate: Any | None
    w_out: Any

    def select(self, expert: int) -> "ExpertWeights":
        """The matrices of one expert."""
        return ExpertWeights(*(None if w is None else w.select(0, expert) for w in self))

    def unbind(self) -> list["ExpertWeights"]:
        """Those of every expert. The gradient of `select` allocates the whole stack each time,
        which makes a backward pass over all experts quadratic in their number; this one does not.
        """
        absent = [None] * self.w_in.shape[0]
        columns = (absent if w is None else w.unbind() for w in self)
        return [ExpertWeights(*row) for row in zip(*columns, strict=True)]


@runtime_checkable
class ExpertBank(Protocol):
    """All E experts of a layer: an `Experts`, or those of several ranks together."""

    num_experts: int

    def __call__(self, inputs: ExpertInput) -> Float[Tensor, "N O"]:
        """Each expert's outputs for its tokens, in the same order."""
        ...


def run_experts(
    experts: "Experts", inputs: ExpertInput, weights: ExpertWeights
) -> Float[Tensor, "N O"]:
    """Each expert's outputs for its tokens, in the same order; the plain form of `Experts.run`."""
    tokens, counts = inputs
    if counts is None:  # one batched product; static shapes, so it compiles
        slots = tokens.unflatten(0, (weights.w_in.shape[0], -1))  # E C D
        return experts.feed_forward(slots, weights).flatten(0, 1)
    assert not isinstance(counts, Tensor), "counts on the device, without the kernel for them"
    if torch.is_grad_enabled():
        parts = zip(tokens.split(list(counts)), weights.unbind(), strict=True)
        return torch.cat([experts.feed_forward(x, matrices) for x, matrices in parts])
    used = [expert for expert, count in enumerate(counts) if count]  # few of many in decoding
    if len(used) == 1:
        return experts.feed_forward(tokens, weights.select(used[0]))
    parts = zip(tokens.split([counts[expert] for expert in used]), used, strict=True)
    outputs = [experts.feed_forward(x, weights.select(expert)) for x, expert in parts]
    return torch.cat([tokens.new_zeros(0, weights.w_out.shape[2]), *outputs])


class Experts(nn.Module):
    """E feed-forward networks of one shape, each with its own weights."""

    letters = {"w_in": "E D F", "w_gate": "E D F", "w_out": "E F D"}
    run: Callable[["Experts", ExpertInput, ExpertWeights], Tensor] = staticmethod(run_experts)
    matmul: Matmul = staticmethod(torch.matmul)

    def __init__(
        self,
        experts: int,
        d_model: int,
        d_ff: int,
        *,
        activation: str = "relu",
        gated: bool = False,
        dropout: float = 0.0,
        d_out: int | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.activation, self.dropout = activation, dropout
        self.num_experts, self.d_out = experts, d_out or d_model
        self.w_in = nn.Parameter(torch.empty(experts, d_model, d_ff))
        self.w_gate = nn.Parameter(torch.empty(experts, d_model, d_ff)) if gated else None
        self.w_out = nn.Parameter(torch.empty(experts, d_ff, self.d_out))

    @property
    def weights(self) -> ExpertWeights:
        """The stacks, as `run` takes them."""
        return ExpertWeights(self.w_in, self.w_gate, self.w_out)

    def forward(self, inputs: ExpertInput) -> Float[Tensor, "N O"]:
        """Each expert's outputs for its tokens, in the same order."""
        return self.run(self, inputs, self.weights)

    def run_one(self, expert: int, x: Float[Tensor, "C D"]) -> Float[Tensor, "C O"]:
        """Expert number `expert` applied to `x`. The reference for every `run`."""
        return self.feed_forward(x, self.weights.select(expert))

    def feed_forward(
        self, x: Tensor, weights: ExpertWeights, matmul: Matmul | None = None
    ) -> Tensor:
        """One expert's matrices applied to its tokens [C D], giving [C O], or those of all experts
        to equally many each [E C D]; `matmul`, if given, is used in place of the seam's."""
        matmul = matmul or self.matmul
        gate = None if weights.w_gate is None else matmul(x, weights.w_gate)
        hidden = activate(matmul(x, weights.w_in), gate, self.activation)
        if self.training and self.dropout > 0:
            hidden = F.dropout(hidden, self.dropout)
        return matmul(hidden, weights.w_out)
