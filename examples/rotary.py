"""Rotary positions in place of T5's relative bias, put into a model from outside.

    python examples/rotary.py                                      # some seconds on a laptop

Queries and keys are rotated by their positions (arXiv 2104.09864), so that a score depends on the
distance of the two. The model learns to reverse its input, for which it has to know positions.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from switchworks import ModelConfig, RoutingConfig, SwitchTransformer
from switchworks.model import PositionEncoding


class Rotary(PositionEncoding):
    """Rotates the pairs (i, i + K / 2) of a head's columns by position * base ** (-2 i / K)."""

    frequencies: Tensor

    def __init__(self, width: int, base: float = 10_000.0) -> None:
        super().__init__()
        exponent = torch.arange(0, width, 2).double() / width
        self.register_buffer("frequencies", base**-exponent, persistent=False)

    def forward(self, num_queries: int, num_keys: int, first: int = 0) -> Tensor:
        """Nothing is added to the scores."""
        return torch.zeros(1, 1, num_queries, num_keys, device=self.frequencies.device)

    def rotate(self, x: Tensor, first: int | Tensor) -> Tensor:
        """Queries or keys [B, H, L, K] at positions first, first + 1, ..."""
        position = first + torch.arange(x.shape[2], device=x.device)
        angle = position[..., None] * self.frequencies
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        even, odd = x.chunk(2, dim=-1)
        return torch.cat([even * cos - odd * sin, even * sin + odd * cos], dim=-1)


def rotary_model(config: ModelConfig, seed: int = 0) -> SwitchTransformer:
    """A model whose encoder and decoder rotate; it has no relative bias to train or to save."""
    model = SwitchTransformer(config, seed=seed)
    for stack in (model.encoder, model.decoder):
        if stack is not None:
            stack.relative_bias = Rotary(config.d_kv)
    return model


def main(words: Sequence[str] | None = None) -> tuple[float, float]:
    """Prints and returns the loss of the first and of the last step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args(words).steps
    torch.manual_seed(0)
    routing = RoutingConfig(experts=4)
    model = rotary_model(
        ModelConfig(vocab_size=32, d_model=32, d_ff=64, d_kv=16, num_heads=2, routing=routing)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        inputs = torch.randint(2, 32, (16, 6))
        loss = model(inputs, inputs.flip(1)).losses.total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
