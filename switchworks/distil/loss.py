"""What a student learns from its teacher's logits.

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
    """Temperature^2 times the mean cross-entropy, in nats, with the teacher's probabilities.

    Both sides' logits are divided by the temperature; its square keeps the gradient's size (Hinton
    et al. 2015). Never below temperature^2 times the teacher's mean entropy, which it is when the
    student has the teacher's probabilities. Counts where `targets` is not padding, 0 without any;
    computed in float32. Only the student's logits get a gradient.
    """
    real = (targets != 0).flatten()
    rows = (student_logits.flatten(0, 1), teacher_logits.detach().flatten(0, 1))
    nats = _SoftCrossEntropy.apply(*rows, temperature)
    return temperature**2 * (nats * real).sum() / real.sum().clamp(min=1)


def stored_distillation_loss(
    student_logits: Float[Tensor, "B T V"],
    taught: TeacherTargets,
    targets: Int[Tensor, "B T"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """`distillation_loss` with the k likeliest ids and the mass of all others as one more outcome.

    `taught` is of the same temperature. With k = V it is `distillation_loss`. With fewer it is
    smaller by what the student gets wrong among the other ids, of which nothing is known; its
    gradient then moves their mass and leaves their proportions, and differs from that of
    `distillation_loss` by at most twice their mass.
    """
    real = (targets != 0).flatten()
    rows = (student_logits.flatten(0, 1), taught.ids.flatten(0, 1), taught.logs.flatten(0, 1))
    nats = _StoredCrossEntropy.apply(*rows, temperature)
    return temperature**2 * (nats * real).sum() / real.sum().clamp(min=1)


class _StoredCrossEntropy(torch.autograd.Function):
    """Nats of every row with the teacher's k likeliest ids and the rest, a few rows at a time."""

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
        for ours, some, theirs in zip(
            *(row_blocks(x, of=student) for x in (student, ids, logs)), strict=True
        ):
            wide = to_float32(ours).div(temperature)
            outcomes = torch.cat([wide.gather(-1, some), _of_others(wide, some)], dim=-1)
            # Where the teacher has no mass left the student's log is -inf, and 0 * -inf is nan.
            outcomes.sub_(wide.logsumexp(dim=-1, keepdim=True)).clamp_(min=_LEAST)
            nats.append(-(outcomes * theirs.exp().to(outcomes)).sum(dim=-1))
        return torch.cat(nats)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_nll: Float[Tensor, "N"]
    ) -> tuple[Float[Tensor, "N V"], None, None, None]:
        student, ids, logs = ctx.saved_tensors
        columns = (student, ids, logs, grad_nll[:, None] / ctx.temperature)
        grads = []
        for ours, some, theirs, share in zip(
            *(row_blocks(column, of=student) for column in columns), strict=True
        ):
            wide = to_float32(ours).div(ctx.temperature)
            probs = wide.softmax(dim=-1)
            taught = theirs.exp().to(probs)
            rest = wide.sub_(_of_others(wide, some)).exp_().nan_to_num_(0.0, posinf=0.0)
            rest.mul_(taught[:, -1:]).scatter_(-1, some, taught[:, :-1])
            grads.append(probs.sub_(rest).mul_(share).to(student.dtype))
        return torch.cat(grads), None, None, None


_LEAST = -1e30


def _of_others(wide: Float[Tensor, "N V"], ids: Int[Tensor, "N k"]) -> Float[Tensor, "N 1"]:
    """Log-sum-exp over all columns but `ids`; -inf if there are no others."""
    return wide.scatter(-1, ids, float("-inf")).logsumexp(dim=-1, keepdim=True)


class _SoftCrossEntropy(torch.autograd.Function):
    """Nats of every row with the teacher's softened probabilities, a few rows at a time.

    Beside the student's logits one tensor of their size is kept, the gradient, so that each side's
    softmax is taken once and the teacher's logits can go.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], temperature: float
    ) -> Float[Tensor, "N"]:
        gradient, nats = torch.empty_like(student), []
        for ours, theirs, kept in zip(
            *(row_blocks(rows, of=student) for rows in (student, teacher, gradient)), strict=True
        ):
            wide = _soften(ours, temperature)
            probs, taught = wide.softmax(dim=-1), _soften(theirs, temperature).softmax(dim=-1)
            log_z = wide.amax(dim=-1) - probs.amax(dim=-1).log()
            nats.append(log_z - torch.linalg.vecdot(taught, wide))
            kept.copy_(probs.sub_(taught))
        ctx.save_for_backward(gradient)
        ctx.temperature = temperature
        return torch.cat(nats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll: Float[Tensor, "N"]) -> tuple[Float[Tensor, "N V"], None, None]:
        (gradient,) = ctx.saved_tensors
        shares = row_blocks(grad_nll[:, None] / ctx.temperature, of=gradient)
        parts = zip(row_blocks(gradient), shares, strict=True)
        return torch.cat([(to_float32(kept) * share).to(kept) for kept, share in parts]), None, None


def _soften(logits: Float[Tensor, "N V"], temperature: float) -> Float[Tensor, "N V"]:
    """In float32 over the temperature; the logits themselves where that is what they are."""
    return to_float32(logits) if temperature == 1 else to_float32(logits).div(temperature)
