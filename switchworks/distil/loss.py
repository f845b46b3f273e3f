"""Distillation losses, with full or stored teacher probabilities.

Letters: B sequences, T target length, V vocabulary, N rows of logits, k ids a store keeps.
"""

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
    real = (targets != 0).flatten()
    rows = (student_logits.flatten(0, 1), teacher_logits.detach().flatten(0, 1))
    nats = _SoftCrossEntropy.apply(*rows, temperature)
    return temperature**2 * (nats * real).sum() / real.sum().clamp(min=1)


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
    real = (targets != 0).flatten()
    rows = (student_logits.flatten(0, 1), teacher.ids.flatten(0, 1), teacher.logs.flatten(0, 1))
    nats = _StoredCrossEntropy.apply(*rows, temperature)
    return temperature**2 * (nats * real).sum() / real.sum().clamp(min=1)


class _StoredCrossEntropy(torch.autograd.Function):
    """Nats of every row over k + 1 outcomes, block of rows by block of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Float[Tensor, "N V"],
        ids: Int[Tensor, "N k"],
        logs: Float[Tensor, "N k1"],
        temperature: float,
    ) -> Float[Tensor, "N"]:
        ctx.save_for_backward(student, ids, logs)
        ctx.temperature = temperature
        nats = []
        for block, top, teacher in zip(
            *(row_blocks(x, like=student) for x in (student, ids, logs)), strict=True
        ):
            logits = to_float32(block).div(temperature)
            outcomes = torch.cat([logits.gather(-1, top), _log_rest(logits, top)], dim=-1)
            # With k = V the rest has probability 0 and log -inf: 0 * -inf would be nan.
            outcomes.sub_(logits.logsumexp(dim=-1, keepdim=True)).clamp_(min=_LOWEST)
            nats.append(-(outcomes * teacher.exp().to(outcomes)).sum(dim=-1))
        return torch.cat(nats)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_nll: Float[Tensor, "N"]
    ) -> tuple[Float[Tensor, "N V"], None, None, None]:
        student, ids, logs = ctx.saved_tensors
        columns = (student, ids, logs, grad_nll[:, None] / ctx.temperature)
        grads = []
        for block, top, teacher, scale in zip(
            *(row_blocks(column, like=student) for column in columns), strict=True
        ):
            logits = to_float32(block).div(ctx.temperature)
            probs = logits.softmax(dim=-1)
            stored = teacher.exp().to(probs)
            # The teacher's mass for the rest, divided in the student's own proportions, so that
            # softmax minus this pulls the rest up or down as a whole; with k = V there is no rest.
            wanted = logits.sub_(_log_rest(logits, top)).exp_().nan_to_num_(0.0, posinf=0.0)
            wanted.mul_(stored[:, -1:]).scatter_(-1, top, stored[:, :-1])
            grads.append(probs.sub_(wanted).mul_(scale).to(student.dtype))
        return torch.cat(grads), None, None, None


_LOWEST = -1e30


def _log_rest(logits: Float[Tensor, "N V"], ids: Int[Tensor, "N k"]) -> Float[Tensor, "N 1"]:
    """Log-sum-exp over all columns but `ids`; -inf if there are no others."""
    return logits.scatter(-1, ids, float("-inf")).logsumexp(dim=-1, keepdim=True)


class _SoftCrossEntropy(torch.autograd.Function):
    """Nats of every row over all ids, block of rows by block of rows. Forward computes the gradient
    too and saves it in place of both logits: each softmax is computed once, and the teacher's
    logits can be freed."""

    @staticmethod
    def forward(
        ctx: Any, student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], temperature: float
    ) -> Float[Tensor, "N"]:
        gradient, nats = torch.empty_like(student), []
        for block, teacher_block, grad_block in zip(
            *(row_blocks(rows, like=student) for rows in (student, teacher, gradient)), strict=True
        ):
            logits = _soften(block, temperature)
            probs = logits.softmax(dim=-1)
            wanted = _soften(teacher_block, temperature).softmax(dim=-1)
            # log Z from the softmax already there: its largest value is exp(max - log Z).
            log_z = logits.amax(dim=-1) - probs.amax(dim=-1).log()
            nats.append(log_z - torch.linalg.vecdot(wanted, logits))
            grad_block.copy_(probs.sub_(wanted))
        ctx.save_for_backward(gradient)
        ctx.temperature = temperature
        return torch.cat(nats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll: Float[Tensor, "N"]) -> tuple[Float[Tensor, "N V"], None, None]:
        (gradient,) = ctx.saved_tensors
        scales = row_blocks(grad_nll[:, None] / ctx.temperature, like=gradient)
        blocks = zip(row_blocks(gradient), scales, strict=True)
        return torch.cat([(to_float32(g) * scale).to(g) for g, scale in blocks]), None, None


def _soften(logits: Float[Tensor, "N V"], temperature: float) -> Float[Tensor, "N V"]:
    """Logits in float32, divided by the temperature; not copied where nothing changes."""
    return to_float32(logits) if temperature == 1 else to_float32(logits).div(temperature)
