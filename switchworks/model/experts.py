"""The experts: E feed-forward networks in stacked weights, and three ways to run them.

Tokens reach them sorted by expert. How many each expert gets is either the same for all (slots
padded to a capacity) or a list of counts (no padding). All paths give the same numbers; the
tests hold each to `run_reference`.

Letters: E experts, N tokens sorted by expert, C tokens of one expert, D width, F hidden width,
O width of the answers (D but in switch attention).
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from switchworks.model.config import check_activation
from switchworks.model.layers import activate


class ExpertInput(NamedTuple):
    """Tokens sorted by the expert that is to see them."""

    tokens: Float[Tensor, "N D"]
    counts: Sequence[int] | Int[Tensor, "E"] | None
    """Tokens per expert; None: N / E each. A tensor, which nobody may read on the host, comes only
    to experts whose kernel takes one: their sum may be below N, and the rest is zeros."""


@runtime_checkable
class ExpertBank(Protocol):
    """Whoever answers for all E experts: an `Experts`, or those of several ranks together."""

    num_experts: int

    def __call__(self, inbox: ExpertInput) -> Float[Tensor, "N O"]:
        """Each expert's answer to its tokens, in the same order."""
        ...


class Experts(nn.Module):
    """E feed-forward networks of one shape, each with its own weights."""

    letters = {"w_in": "E D F", "w_gate": "E D F", "w_out": "E F D"}  # noqa: RUF012

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
        self.activation = activation
        self.dropout = dropout
        self.num_experts = experts
        self.w_in = nn.Parameter(torch.empty(experts, d_model, d_ff))
        self.w_gate = nn.Parameter(torch.empty(experts, d_model, d_ff)) if gated else None
        self.w_out = nn.Parameter(torch.empty(experts, d_ff, d_out or d_model))

    def forward(self, inbox: ExpertInput) -> Float[Tensor, "N O"]:
        """Each expert's answer to its tokens, in the same order."""
        if inbox.counts is None:
            return self._run_even(inbox.tokens)
        assert not isinstance(inbox.counts, Tensor), "a kernel's counts, without that kernel"
        return self._run_uneven(inbox.tokens, inbox.counts)

    def one(self, expert: int, x: Float[Tensor, "C D"]) -> Float[Tensor, "C O"]:
        """What expert number `expert` makes of `x`. The reference for every path."""
        w_gate = None if self.w_gate is None else self.w_gate[expert]
        return self.feed_forward(x, self.w_in[expert], w_gate, self.w_out[expert])

    def feed_forward(self, x: Tensor, w_in: Tensor, w_gate: Tensor | None, w_out: Tensor) -> Tensor:
        """What one expert's weights make of its tokens [C D], giving [C O], or those of all experts
        of equally many each [E C D]."""
        gate = None if w_gate is None else x @ w_gate
        hidden = activate(x @ w_in, gate, self.activation)
        if self.training and self.dropout > 0:
            hidden = F.dropout(hidden, self.dropout)
        return hidden @ w_out

    def _run_even(self, tokens: Float[Tensor, "N D"]) -> Float[Tensor, "N O"]:
        """All experts in one batched product; static shapes, so it compiles."""
        slots = tokens.unflatten(0, (self.w_in.shape[0], -1))  # E C D
        return self.feed_forward(slots, self.w_in, self.w_gate, self.w_out).flatten(0, 1)

    def _run_uneven(
        self, tokens: Float[Tensor, "N D"], counts: Sequence[int]
    ) -> Float[Tensor, "N O"]:
        """One product per expert, without padding.

        `unbind` and not `w[i]`: the gradient of an index allocates the whole stack each time,
        which makes the backward pass quadratic in the number of experts. Without gradients only
        the experts that have tokens are looked at, few of them when decoding.
        """
        if not torch.is_grad_enabled():
            used = [expert for expert, count in enumerate(counts) if count]
            if len(used) == 1:
                return self.one(used[0], tokens)
            split = tokens.split([counts[expert] for expert in used])
            answers = [self.one(expert, x) for expert, x in zip(used, split, strict=True)]
            return torch.cat([tokens.new_zeros(0, self.w_out.shape[2]), *answers])
        gates = [None] * len(counts) if self.w_gate is None else self.w_gate.unbind()
        parts = zip(
            tokens.split(list(counts)), self.w_in.unbind(), gates, self.w_out.unbind(), strict=True
        )
        return torch.cat([self.feed_forward(*part) for part in parts])
