"""The router: scores of tokens for experts, and the noise and the bias on them.

Read after `strategies.py`, before `dispatch.py`.

Letters: G groups, S tokens per group, E experts, D model width.

Two choices look odd and are deliberate:
- Routing runs in float32 even in bfloat16 models (paper, section 2.4).
- Tokens compete for slots only inside their group, and a group is a configured number of whole
  rows, never derived from the mesh: adding devices must not change who is dropped.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from switchworks.model.config import RoutingConfig
from switchworks.model.layers import to_float32


def jitter(x: Float[Tensor, "*b"], size: float) -> Float[Tensor, "*b"]:
    """`x` times factors even between 1 - `size` and 1 + `size` (appendix C)."""
    return x * torch.empty_like(x).uniform_(1 - size, 1 + size)


class Router(nn.Module):
    """One bias-free matrix from tokens to expert logits (equation 1), and the first choice."""

    letters = {"weight": "E D", "selection_bias": "E"}

    def __init__(self, d_model: int, config: RoutingConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, d_model))
        bias = nn.Parameter(torch.zeros(config.experts), requires_grad=False)
        self.selection_bias = bias if config.bias_rate > 0 else None

    def forward(self, x: Float[Tensor, "G S D"]) -> Float[Tensor, "G S E"]:
        """Logits in float32, or wider if `x` is. In training a noisy copy of `x` is scored."""
        wide = to_float32(x)
        if self.training:
            wide = self._explore(wide)
        # Autocast would turn this product into bfloat16 again.
        with torch.autocast(x.device.type, enabled=False):
            return self.logits(wide)

    def logits(self, x: Float[Tensor, "G S D"]) -> Float[Tensor, "G S E"]:
        """The product alone, in the dtype of `x`."""
        return F.linear(x, self.weight.to(x.dtype))

    def choose(
        self, logits: Float[Tensor, "G S E"], probs: Float[Tensor, "G S E"]
    ) -> Int[Tensor, "G S"]:
        """The expert each token wants most, before anything is dropped.

        The most probable; in training with `exploration = "sample"` one drawn from the softmax (by
        Gumbel's trick). A selection bias shifts the choice and never the gate.
        """
        if self.training and self.config.exploration == "sample":
            return (logits - torch.empty_like(logits).exponential_().log()).argmax(dim=-1)
        if self.selection_bias is not None:
            return (probs + self.selection_bias.to(probs.dtype)).argmax(dim=-1)
        return probs.argmax(dim=-1)

    @torch.no_grad()
    def update_bias(self, load: Float[Tensor, "E"]) -> None:
        """Move the selection bias by `bias_rate` towards experts with less than their share.

        Balancing without a loss (arXiv 2408.15664): call it once per optimizer step with the
        load of the whole batch. Does nothing without a `bias_rate`.
        """
        if self.selection_bias is not None:
            load = load.to(self.selection_bias)
            self.selection_bias += self.config.bias_rate * (load.mean() - load).sign()

    def _explore(self, x: Float[Tensor, "G S D"]) -> Float[Tensor, "G S D"]:
        """Appendix C: the input itself, or with noise."""
        config = self.config
        if config.exploration == "input_jitter" and config.jitter > 0:
            return jitter(x, config.jitter)
        if config.exploration == "input_dropout":
            return F.dropout(x, config.input_dropout)
        return x
