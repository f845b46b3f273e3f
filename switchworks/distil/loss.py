"""Distillation losses, with full or stored teacher probabilities.

Letters: B sequences, T target length, V vocabulary, N rows of logits, k ids a store keeps.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchworks.distil.store import TeacherTargets
from switchworks.model import row_blocks, to_float32


def distillation_loss(
    student_logits: Float[Tensor, "B T V"],
    teacher_logits: Float[Tensor, "B T V"],
    targets: Int[Tensor, "B T"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Temperature^2 times the mean cross-entropy with the teacher's probabilities, in nats.

    Both models' logits are divided by the temperature; its square keeps the scale of the gradient
    (Hinton et al. 2015). The minimum, temperature^2 times the teacher's mean entropy, is reached by
    the teacher's own probabilities. The mean is over targets that are not padding, 0 without any;
    computed in float32. Only the student's logits get a gradient.
    """
    return _mean_nats(_soft, temperature, targets, student_logits, teacher_logits.detach())


def stored_distillation_loss(
    student_logits: Float[Tensor, "B T V"],
    teacher: TeacherTargets,
    targets: Int[Tensor, "B T"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """`distillation_loss` over k + 1 outcomes: the k most likely ids, and all other ids together.

    `teacher` was stored at the same temperature. Equal to `distillation_loss` for k = V. For k < V
    it leaves out the divergence within the other ids, which are not stored; its gradient then
    changes their mass but not their proportions, and differs from that of `distillation_loss` by at
    most twice their mass.
    """
    return _mean_nats(_stored, temperature, targets, student_logits, teacher.ids, teacher.logs)


def _mean_nats(
    nats_and_grad: Callable[..., tuple[Tensor, Tensor]],
    temperature: float,
    targets: Int[Tensor, "B T"],
    *logits: Tensor,
) -> Float[Tensor, ""]:
    """Temperature^2 times the mean over targets that are not padding."""
    real = (targets != 0).flatten()
    rows = [part.flatten(0, 1) for part in logits]
    nats = _BlockwiseNats.apply(nats_and_grad, temperature, *rows)
    return temperature**2 * (nats * real).sum() / real.sum().clamp(min=1)


class _BlockwiseNats(torch.autograd.Function):
    """Nats of every row by `nats_and_grad`, block of rows by block of rows.

    Forward computes the gradient too and saves it in place of all logits: each softmax is computed
    once, and the teacher's logits can be freed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        nats_and_grad: Callable[..., tuple[Tensor, Tensor]],
        temperature: float,
        student: Float[Tensor, "N V"],
        *teacher: Tensor,
    ) -> Float[Tensor, "N"]:
        gradient, nats = torch.empty_like(student), []
        columns = (row_blocks(rows, like=student) for rows in (gradient, student, *teacher))
        for grad_block, block, *wanted in zip(*columns, strict=True):
            block_nats, grad = nats_and_grad(temperature, _soften(block, temperature), *wanted)
            nats.append(block_nats)
            grad_block.copy_(grad)
        ctx.save_for_backward(gradient)
        ctx.temperature, ctx.inputs = temperature, 3 + len(teacher)
        return torch.cat(nats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll: Float[Tensor, "N"]) -> tuple[Float[Tensor, "N V"] | None, ...]:
        (gradient,) = ctx.saved_tensors
        scales = row_blocks(grad_nll[:, None] / ctx.temperature, like=gradient)
        blocks = zip(row_blocks(gradient), scales, strict=True)
        grad = torch.cat([(to_float32(g) * scale).to(g) for g, scale in blocks])
        return (None, None, grad, *[None] * (ctx.inputs - 3))


def _soft(
    temperature: float, logits: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N V"]]:
    """Nats over all ids, and their gradient in the softened logits."""
    probs = logits.softmax(dim=-1)
    wanted = _soften(teacher, temperature).softmax(dim=-1)
    # log Z from the softmax already there: its largest value is exp(max - log Z).
    log_z = logits.amax(dim=-1) - probs.amax(dim=-1).log()
    return log_z - torch.linalg.vecdot(wanted, logits), probs.sub_(wanted)


def _stored(
    temperature: float,
    logits: Float[Tensor, "N V"],
    ids: Int[Tensor, "N k"],
    logs: Float[Tensor, "N k1"],
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N V"]]:
    """Nats over k + 1 outcomes, and their gradient in the softened logits."""
    probs, stored = logits.softmax(dim=-1), logs.exp().to(logits)
    rest = logits.scatter(-1, ids, float("-inf")).logsumexp(dim=-1, keepdim=True)
    outcomes = torch.cat([logits.gather(-1, ids), rest], dim=-1)
    # With k = V the rest has probability 0 and log -inf: 0 * -inf would be nan.
    outcomes.sub_(logits.logsumexp(dim=-1, keepdim=True)).clamp_(min=-1e30)
    # The teacher's mass for the rest, divided in the student's own proportions, so that softmax
    # minus this pulls the rest up or down as a whole; with k = V there is no rest.
    wanted = (logits - rest).exp_().nan_to_num_(0.0, posinf=0.0)
    wanted.mul_(stored[:, -1:]).scatter_(-1, ids, stored[:, :-1])
    return -(outcomes * stored).sum(dim=-1), probs.sub_(wanted)


def _soften(logits: Float[Tensor, "N V"], temperature: float) -> Float[Tensor, "N V"]:
    """Logits in float32, divided by the temperature; not copied where nothing changes."""
    return to_float32(logits) if temperature == 1 else to_float32(logits).div(temperature)
