"""A small GPT of one's own, made sparse: its MLPs become switch layers in three lines.

    python examples/causal_lm.py                                   # half a minute on a laptop
    python examples/causal_lm.py --compile                         # one graph; the first step waits
    torchrun --nproc-per-node 2 examples/causal_lm.py --fsdp       # sharded over two processes

The text is the help topics that come with Python, the tokens are bytes. The model is plain
PyTorch; lines that exist because of switchworks end in `# <-`. To sharpen the eye, the output
starts and ends with the loss on held-out text, 5.5 nats per byte being a blind guess.
"""

import argparse
import os
from collections.abc import Sequence
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from switchworks import RoutingConfig, SwitchFFN  # <-

LENGTH = 64
ROUTING = RoutingConfig(experts=4, capacity_factor=1.5)  # <- groups are rows: see RoutingConfig


class Block(nn.Module):
    """Pre-norm attention and a feed-forward layer, the latter sparse."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        # Was: nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.mlp = SwitchFFN(  # <-
            width, 4 * width, ROUTING, activation="gelu", init_scale=1.0, causal=True
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The block's output, then the layer's loss, load and dropped share."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        )
        read = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(read.transpose(1, 2).flatten(2))
        y, routing = self.mlp(self.mlp_norm(x))  # <-
        # The residual is what carries a token whose expert was full: y is 0 for it.
        return x + y, routing.loss, routing.load, routing.dropped


class GPT(nn.Module):
    """A decoder of a few blocks over bytes."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits, the layers' losses added up, their loads and their dropped shares."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        losses, loads, dropped = [], [], []
        for block in self.blocks:
            x, loss, load, share = block(x)
            losses.append(loss)
            loads.append(load)
            dropped.append(share)
        routing_loss = torch.stack(losses).sum()
        return self.head(self.norm(x)), routing_loss, torch.stack(loads), torch.stack(dropped)


def nats(logits: Tensor, rows: Tensor) -> Tensor:
    """Mean nats per byte of predicting each from those before it."""
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Tensor) -> float:
    """In evaluation no token is dropped, so the loss does not depend on how rows are batched."""
    model.eval()
    loss = nats(model(rows[:, :-1])[0], rows)
    model.train()
    return float(loss)


def shard(model: GPT) -> None:
    """FSDP2: every block, experts included, is cut along its first dimension over all ranks.

    An expert stack [E, D, F] is so cut by experts. With a MixedPrecisionPolicy, first give each
    `block.mlp.router` a `fully_shard` of its own without one: routing belongs in float32.
    """
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    held = sum(p.to_local().numel() for p in model.parameters())  # type: ignore[operator]
    total = sum(p.numel() for p in model.parameters())
    print(f"rank {dist.get_rank()} holds {held} of {total} parameters", flush=True)


def train(steps: int, backend: str | None, fsdp: bool) -> tuple[float, float]:
    """Held-out loss before and after training."""
    text = torch.tensor(list("\n".join(topics.values()).encode()))
    rows = text[: len(text) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    held_out, rows = rows[:64], rows[64:]

    rank, ranks = (dist.get_rank(), dist.get_world_size()) if fsdp else (0, 1)
    torch.manual_seed(0)
    model = GPT()
    if fsdp:
        shard(model)
    forward = torch.compile(model, backend=backend, fullgraph=True) if backend else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(rank)  # from here on every rank draws its own jitter

    before = held_out_loss(model, held_out)
    for step in range(steps):
        start = (step * ranks + rank) * 16 % (len(rows) - 16)
        batch = rows[start : start + 16]
        logits, routing_loss, load, dropped = forward(batch[:, :-1])
        loss = nats(logits, batch) + routing_loss  # <- or soon one expert does all the work
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step % 25 == 0 or step == steps - 1):
            shares = "  ".join(
                " ".join(f"{share:.2f}" for share in layer) for layer in load.tolist()
            )
            print(
                f"step {step:3}  loss {loss.item():.3f}  dropped {dropped.mean():.1%}"
                f"  load per layer {shares}",
                flush=True,
            )
    return before, held_out_loss(model, held_out)


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Parse, train, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--compile", metavar="BACKEND", nargs="?", const="inductor")
    parser.add_argument("--fsdp", action="store_true", help="shard over the ranks of torchrun")
    flags = parser.parse_args(arguments)
    if flags.fsdp:
        if "RANK" not in os.environ:
            parser.error("--fsdp needs torchrun --nproc-per-node 2 examples/causal_lm.py --fsdp")
        dist.init_process_group("gloo")  # "nccl" with a device per rank
    before, after = train(flags.steps, flags.compile, flags.fsdp)
    if not flags.fsdp or dist.get_rank() == 0:
        print(f"held-out loss {before:.3f} before, {after:.3f} after, nats per byte", flush=True)
    if flags.fsdp:
        dist.destroy_process_group()
    return before, after


if __name__ == "__main__":
    main()
