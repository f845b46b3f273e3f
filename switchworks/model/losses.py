"""Every loss, as pure functions with their ranges stated.

Letters: G groups, S tokens per group, E experts, B sequences, T target length, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Losses(NamedTuple):
    """What a step minimises, as addends that are already weighted, each a mean over the batch."""

    total: Float[Tensor, ""]
    """The sum of the next four."""
    cross_entropy: Float[Tensor, ""]
    """Nats per target token that is not padding."""
    output_z: Float[Tensor, ""]
    balance: Float[Tensor, ""]
    """alpha * E * sum f P, summed over the switch layers of both stacks."""
    router_z: Float[Tensor, ""]


def balance_loss(
    probs: Float[Tensor, "G S E"], expert: Int[Tensor, "G S"], real: Bool[Tensor, "G S"]
) -> Float[Tensor, ""]:
    """E * sum f P, equations (4) to (6) without alpha: 1 when even, E when collapsed.

    Taken in each group and averaged over the groups. f, the share of real tokens that want an
    expert before any is dropped, has no gradient; P, the mean probability, carries it. A group
    without real tokens counts as 0.
    """
    experts = probs.shape[-1]
    count = real.sum(dim=1, keepdim=True).clamp(min=1)
    share = real.to(probs.dtype) / count  # G S  sums to 1 in each group
    wanted = torch.zeros_like(probs[:, 0]).scatter_add_(1, expert, share)  # G E  f
    offered = (probs * share[..., None]).sum(dim=1)  # G E  P
    return experts * (wanted * offered).sum(dim=-1).mean()


def router_z_loss(logits: Float[Tensor, "G S E"], real: Bool[Tensor, "G S"]) -> Float[Tensor, ""]:
    """Mean over real tokens of the squared log-normaliser of the router (ST-MoE, equation 5).

    Zero or more; it keeps logits small, where float32 and bfloat16 still tell them apart. Taken
    in each group and averaged over the groups, as the balance loss is.
    """
    share = real.to(logits.dtype) / real.sum(dim=1, keepdim=True).clamp(min=1)
    return (logits.logsumexp(dim=-1).square() * share).sum(dim=1).mean()


def cross_entropy(
    logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean nats per real target, and the mean squared log-normaliser of the same positions.

    Targets with id 0 are padding and do not count; with no real target both are 0. Computed in
    float32. The first, with its sign turned, is the paper's negative log perplexity.
    """
    real = targets != 0
    flat = logits.flatten(0, 1)[real.flatten()].float()
    normaliser = flat.logsumexp(dim=-1)
    picked = flat.gather(-1, targets[real][:, None]).squeeze(-1)
    count = max(1, len(flat))
    return (normaliser - picked).sum() / count, normaliser.square().sum() / count


def expert_load(
    expert: Int[Tensor, "G S"], real: Bool[Tensor, "G S"], experts: int
) -> Float[Tensor, "E"]:
    """Share of the real tokens that want each expert; sums to 1, or to 0 without real tokens."""
    counts = F.one_hot(expert[real], experts).sum(dim=0).float()
    return counts / counts.sum().clamp(min=1)
