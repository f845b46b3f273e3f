"""A small vision transformer of one's own, made sparse in three lines.

    python examples/vision_transformer.py                          # half a minute on a laptop

It tells discs, squares, triangles and crosses apart, drawn at random places and sizes into noise.
The model is plain PyTorch; lines that exist because of switchworks end in `# <-`. The output
starts and ends with the share of new images named rightly, a quarter being a blind guess.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switchworks import RoutingConfig, SwitchFFN  # <-

SIDE, PATCH = 24, 4
SHAPES = ("disc", "square", "triangle", "cross")
# An image has only 36 patches, so those of 8 images compete for the experts' slots together.
ROUTING = RoutingConfig(experts=4, group_sequences=8, capacity_factor=1.5)  # <-


def draw(count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """`count` noisy images [count, SIDE, SIDE] and which shape each one shows."""
    kind = rng.integers(len(SHAPES), size=count)
    size = rng.uniform(5, 8, size=(count, 1, 1))
    centre = rng.uniform(8, SIDE - 8, size=(2, count, 1, 1))
    dy, dx = np.mgrid[:SIDE, :SIDE][:, None] - centre
    inside = np.stack(
        [
            np.hypot(dx, dy) < size,
            np.maximum(abs(dx), abs(dy)) < 0.9 * size,
            (abs(dx) < 0.5 * (dy + size)) & (dy < size),
            (np.minimum(abs(dx), abs(dy)) < 1.5) & (np.maximum(abs(dx), abs(dy)) < size),
        ]
    )
    image = inside[kind, np.arange(count)] + rng.normal(0, 0.2, size=(count, SIDE, SIDE))
    return torch.tensor(image, dtype=torch.float32), torch.tensor(kind)


class Block(nn.Module):
    """Pre-norm attention and a feed-forward layer, the latter sparse."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        # Was: nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.mlp = SwitchFFN(width, 4 * width, ROUTING, activation="gelu", init_scale=1.0)  # <-

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The block's output, then the layer's loss and the load of its experts."""
        normed = self.attention_norm(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        y, routing = self.mlp(self.mlp_norm(x))  # <-
        return x + y, routing.loss, routing.load


class ViT(nn.Module):
    """Patches, a few blocks, the mean over the patches, a class."""

    def __init__(self, width: int = 48, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, PATCH, stride=PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(SHAPES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, the layers' losses added up and their loads."""
        x = self.patches(images[:, None]).flatten(2).transpose(1, 2) + self.positions
        losses, loads = [], []
        for block in self.blocks:
            x, loss, load = block(x)
            losses.append(loss)
            loads.append(load)
        return self.head(self.norm(x.mean(dim=1))), torch.stack(losses).sum(), torch.stack(loads)


@torch.no_grad()
def accuracy(model: ViT, images: Tensor, kinds: Tensor) -> float:
    """Share of the images that are named rightly."""
    model.eval()
    right = model(images)[0].argmax(dim=-1) == kinds
    model.train()
    return float(right.float().mean())


def train(steps: int) -> tuple[float, float]:
    """Accuracy on new images before and after training."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    model = ViT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    new = draw(400, rng)
    before = accuracy(model, *new)
    for step in range(steps):
        images, kinds = draw(48, rng)  # a multiple of group_sequences
        logits, routing_loss, load = model(images)
        loss = F.cross_entropy(logits, kinds) + routing_loss  # <- keeps all experts in use
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            shares = "  ".join(
                " ".join(f"{share:.2f}" for share in layer) for layer in load.tolist()
            )
            print(f"step {step:3}  loss {loss.item():.3f}  load per layer {shares}")
    return before, accuracy(model, *new)


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Parse, train, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    before, after = train(parser.parse_args(arguments).steps)
    print(f"named rightly: {before:.0%} before, {after:.0%} after")
    return before, after


if __name__ == "__main__":
    main()
