"""A student's first weights, and how much of its teacher's gain it kept (section 4.2)."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import nn

from switchworks.batch import Batch
from switchworks.compress import dense_equivalent, merge_experts, prune_experts
from switchworks.model import FFN, AttentionBase, Experts, ModelConfig, Router, SwitchTransformer


class Inherited(NamedTuple):
    """Names of a student's parameters, in its order."""

    copied: list[str]
    """Those with the teacher's values."""
    fresh: list[str]
    """Those left as they were."""


@torch.no_grad()
def initialise_from_teacher(student: SwitchTransformer, teacher: SwitchTransformer) -> Inherited:
    """`student` has the teacher's values wherever a name and its shape are in both.

    Experts and routers are never copied, nor the attention of heads of other numbers or widths, nor
    an FFN of another activation. Of a sparse teacher and a student of the same width that
    is embeddings, attention, norms and the FFNs of dense blocks; the FFNs that stand where the
    teacher has switch layers keep their first values, unless the teacher is first made dense (see
    `dense_teacher`). Nothing is shared with `teacher`.
    """
    foreign = (
        _of_switch_layers(student)
        | _of_switch_layers(teacher)
        | _laid_out_otherwise(student, teacher.config)
    )
    taught = dict(teacher.named_parameters())
    inherited = Inherited([], [])
    for name, parameter in student.named_parameters():
        source = taught.get(name)
        if source is None or source.shape != parameter.shape or name in foreign:
            inherited.fresh.append(name)
            continue
        parameter.copy_(source)
        inherited.copied.append(name)
    return inherited


def dense_teacher(
    teacher: SwitchTransformer, batches: Sequence[Batch], ffn: Literal["average", "most_used"]
) -> SwitchTransformer:
    """`teacher` with one FFN in place of each layer's experts, as a source of first values.

    "average" is that of all experts by their use on `batches`, hidden units aligned, "most_used"
    the one that most tokens want. Either is scaled by the gates its tokens had.
    """
    reduce = merge_experts if ffn == "average" else prune_experts
    return dense_equivalent(reduce(teacher, batches, 1).model)


def fraction_of_gain(*, baseline: float, teacher: float, student: float) -> float:
    """(student - baseline) / (teacher - baseline), the paper's "percent of teacher gain" / 100.

    Of losses, of log perplexities or of any score, but all three of one kind. 0 is a student no
    better than the baseline trained without a teacher, 1 one as good as the teacher; nan where
    the teacher is no different from the baseline.
    """
    gain = teacher - baseline
    return (student - baseline) / gain if gain else float("nan")


def _laid_out_otherwise(student: SwitchTransformer, teacher: ModelConfig) -> set[str]:
    """Names of the student's parameters whose like means something else in the teacher."""
    ours = student.config
    kinds: tuple[type[nn.Module], ...] = ()
    if (ours.num_heads, ours.d_kv) != (teacher.num_heads, teacher.d_kv):
        kinds += (AttentionBase,)
    if (ours.activation, ours.gated) != (teacher.activation, teacher.gated):
        kinds += (FFN,)
    return {
        f"{path}.{name}"
        for path, module in student.named_modules()
        if isinstance(module, kinds)
        for name, _ in module.named_parameters()
    }


def _of_switch_layers(model: SwitchTransformer) -> set[str]:
    """Names of the parameters that experts and routers hold."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, Experts | Router)
        for name, _ in module.named_parameters()
    }
