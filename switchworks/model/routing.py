"""Top-1 routing: which expert sees each token, and which tokens are dropped.

Read after `layers.py`, before `dispatch.py`. Nothing here moves a token or talks to another
device: routing writes a plan (`Routes`); a dispatcher carries it out.

Letters: G groups, S tokens per group, E experts, D model width.

Two choices look odd and are deliberate:
- Routing runs in float32 even in bfloat16 models (paper, section 2.4).
- Tokens compete for slots only inside their group, and a group is a configured number of whole
  rows, never derived from the mesh: adding devices must not change who is dropped.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class Routes(NamedTuple):
    """The plan for every token: where it goes and with what weight."""

    expert: Int[Tensor, "G S"]
    """The expert each token wants."""
    slot: Int[Tensor, "G S"]
    """Its place in that expert's queue, from 0; meaningless for padding."""
    kept: Bool[Tensor, "G S"]
    """False for padding and for tokens whose queue was full."""
    gate: Float[Tensor, "G S"]
    """Router probability of the wanted expert, float32; scales the expert's answer."""


class Router(nn.Module):
    """Scores every expert for every token: one matrix without bias, always in float32."""

    letters = {"weight": "E D"}  # noqa: RUF012

    def __init__(self, d_model: int, experts: int, jitter: float) -> None:
        super().__init__()
        self.jitter = jitter
        self.weight = nn.Parameter(torch.empty(experts, d_model))

    def forward(self, x: Float[Tensor, "G S D"]) -> Float[Tensor, "G S E"]:
        """Logits in float32. In training a noisy copy of `x` is scored; `x` is not touched."""
        wide = x.float()
        if self.training and self.jitter > 0:
            wide = wide * torch.empty_like(wide).uniform_(1 - self.jitter, 1 + self.jitter)
        # Autocast would turn this product into bfloat16 again.
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(wide, self.weight.float())


def route(probs: Float[Tensor, "G S E"], real: Bool[Tensor, "G S"], capacity: int | None) -> Routes:
    """Send each real token to its likeliest expert, first come first served.

    A token is kept while fewer than `capacity` earlier real tokens of its group want the same
    expert (Mesh-TF: an exclusive cumulative sum; section 2.2). None keeps every real token.
    """
    gate, expert = probs.max(dim=-1)
    arrivals = F.one_hot(expert, probs.shape[-1]) * real[..., None]  # G S E
    before = arrivals.cumsum(dim=1) - arrivals  # G S E  exclusive
    slot = before.gather(-1, expert[..., None]).squeeze(-1)
    kept = real if capacity is None else real & (slot < capacity)
    return Routes(expert, slot, kept, gate)
