"""Every loss, as pure functions with their ranges stated.

Letters: G groups, S tokens per group, E experts, B sequences, T target length, V vocabulary,
N rows of logits.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchworks.model.layers import to_float32

BLOCK = 2**18
"""Logits converted to float32 at once."""


class Losses(NamedTuple):
    """What a step minimises, as addends that are already weighted, each a mean over the batch."""

    total: Float[Tensor, ""]
    """The sum of the next four."""
    cross_entropy: Float[Tensor, ""]
    """Nats per target token that is not padding."""
    output_z: Float[Tensor, ""]
    balance: Float[Tensor, ""]
    """alpha * E * sum f P, summed over all switch layers."""
    router_z: Float[Tensor, ""]


def balance_loss(
    probs: Float[Tensor, "G S E"], expert: Int[Tensor, "G S"], real: Bool[Tensor, "G S"]
) -> Float[Tensor, ""]:
    """E * sum f P, equations (4) to (6) without alpha: 1 when even, E when collapsed.

    Taken in each group and averaged over the groups. f, the share of real tokens that choose an
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
    real = (targets != 0).flatten()
    nats, normaliser = _CrossEntropy.apply(logits.flatten(0, 1), targets.flatten())
    count = real.sum().clamp(min=1)
    return (nats * real).sum() / count, (normaliser.square() * real).sum() / count


class _CrossEntropy(torch.autograd.Function):
    """Nats and log-normaliser of every row, a few rows at a time in float32.

    A float32 copy of all logits, their softmax and their gradient would be the largest tensors of
    a training step. Here only the logits themselves and one number per row are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Float[Tensor, "N V"], targets: Int[Tensor, "N"]
    ) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
        blocks = [to_float32(block).logsumexp(dim=-1) for block in row_blocks(logits)]
        normaliser = torch.cat(blocks)
        picked = logits.gather(-1, targets[:, None]).squeeze(-1).to(normaliser.dtype)
        ctx.save_for_backward(logits, targets, normaliser)
        return normaliser - picked, normaliser

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_nll: Float[Tensor, "N"], grad_normaliser: Float[Tensor, "N"]
    ) -> tuple[Float[Tensor, "N V"], None]:
        logits, targets, normaliser = ctx.saved_tensors
        whole = (grad_nll + grad_normaliser)[:, None]
        grads = torch.empty_like(logits)
        columns = (logits, grads, targets[:, None], normaliser[:, None], whole, -grad_nll[:, None])
        # The gradient is softmax * (grad_nll + grad_normaliser), minus grad_nll at the target; the
        # softmax is recomputed from the kept normaliser, block by block.
        parts = zip(*(row_blocks(column, like=logits) for column in columns), strict=True)
        for block, grad, target, log_z, share, minus in parts:
            probs = to_float32(block).sub(log_z).exp_()
            grad.copy_(probs.mul_(share).scatter_add_(-1, target, minus))
        return grads, None


def row_blocks(rows: Tensor, like: Tensor | None = None) -> tuple[Tensor, ...]:
    """`rows` in at most 64 parts, of about a megabyte of logits each where that is larger; in one
    for `torch.export`, which may not know how many rows there will be."""
    if torch.compiler.is_exporting():
        return (rows,)
    logits = rows if like is None else like
    length = max(-(-len(logits) // 64), BLOCK // logits.shape[-1], 1)
    return rows.split(length)


def expert_load(
    expert: Int[Tensor, "G A"], real: Bool[Tensor, "G A"], experts: int
) -> Float[Tensor, "E"]:
    """Share of each expert in the real assignments; sums to 1, or to 0 without any."""
    counts = torch.zeros(experts, device=expert.device)
    counts.scatter_add_(0, expert.flatten(), real.flatten().float())
    return counts / counts.sum().clamp(min=1)
