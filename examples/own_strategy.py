"""A routing strategy of one's own: the two experts of the highest sigmoid, balanced by a bias.

    python examples/own_strategy.py                                # some seconds on a laptop

As in DeepSeek-V3 (arXiv 2412.19437): each expert is scored by itself, the bias moves the choice and
never the gate, the gates of a token are scaled to sum to 1, and there is no balance loss. The
output is the load of the fullest expert over an even one, with the bias and without.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from switchworks.model import (
    STRATEGIES,
    Routes,
    RoutingConfig,
    RoutingLimits,
    Strategy,
    SwitchFFN,
    queue,
)


def top_k(probs: Tensor, _choice: Tensor, real: Tensor, limits: RoutingLimits) -> Routes:
    """From probabilities [G, S, E] two assignments a token, in order of position: it is causal."""
    groups, tokens, experts = probs.shape
    bias = 0.0 if limits.selection_bias is None else limits.selection_bias
    expert = (probs + bias).topk(2, dim=-1).indices  # G S 2
    gate = probs.gather(-1, expert)
    gate = gate / gate.sum(dim=-1, keepdim=True)
    token = torch.arange(tokens, device=probs.device).repeat_interleave(2).expand(groups, -1)
    wanted = real.repeat_interleave(2, dim=1)
    slot = queue(expert.flatten(1), wanted, experts)
    kept = wanted if limits.capacity is None else wanted & (slot < limits.capacity)
    return Routes(expert.flatten(1), slot, kept, gate.flatten(1), token)


STRATEGIES["sigmoid_top2"] = Strategy(
    plan=top_k, experts_per_token=2, gates_sum_to_one=True, score=torch.sigmoid
)


def fullest(bias_rate: float, steps: int) -> float:
    """Trains a layer on crowded tokens; the load of its fullest expert, 1 if all are equal."""
    torch.manual_seed(0)
    balance = {"bias_rate": bias_rate, "balance_weight": 0.0, "capacity_factor": None}
    routing = RoutingConfig(experts=8, strategy="sigmoid_top2", **balance)
    layer = SwitchFFN(16, 32, routing, init_scale=1.0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    crowd, target, loads = torch.randn(16), torch.randn(16, 16), []
    for _ in range(steps):
        x = crowd + 0.5 * torch.randn(4, 64, 16)  # most tokens want the same experts at first
        y, routing_report = layer(x)
        loss = (y - x @ target).square().mean() + routing_report.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assigned = torch.bincount(routing_report.routes.expert.flatten(), minlength=8).float()
        layer.router.update_bias(assigned / assigned.sum())
        loads.append(assigned / assigned.sum())
    return float(torch.stack(loads[-20:]).mean(dim=0).max() * 8)


def main(words: Sequence[str] | None = None) -> tuple[float, float]:
    """Prints both loads and returns them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args(words).steps
    balanced, plain = fullest(0.02, steps), fullest(0.0, steps)
    print(f"fullest expert: {balanced:.2f} of an even share with the bias, {plain:.2f} without")
    return balanced, plain


if __name__ == "__main__":
    main()
