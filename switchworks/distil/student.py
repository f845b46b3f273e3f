"""A student's initial weights, and how much of its teacher's gain it kept (section 4.2)."""

from typing import NamedTuple

import torch
from torch import nn

from switchworks.model import FFN, AttentionBase, Experts, ModelConfig, Router, SwitchTransformer


class Inherited(NamedTuple):
    """Names of a student's parameters, in its order."""

    copied: list[str]
    """Those with the teacher's values."""
    fresh: list[str]
    """Those left as they were."""


@torch.no_grad()
def initialise_from_teacher(student: SwitchTransformer, teacher: SwitchTransformer) -> Inherited:
    """Copies the teacher's values to every parameter of `student` with the same name and shape.

    Except experts and routers, attention with another number or width of heads, and FFNs with
    another activation. From a sparse teacher to a student of the same width this copies embeddings,
    attention, norms and the FFNs of dense blocks; the FFNs in place of the teacher's switch layers
    keep their initial values, unless the teacher is made dense first (`dense_teacher`).
    """
    sparse = (Experts, Router)
    excluded = _parameters_in(student, sparse) | _parameters_in(teacher, sparse)
    excluded |= _incompatible(student, teacher.config)
    sources = dict(teacher.named_parameters())
    inherited = Inherited([], [])
    for name, parameter in student.named_parameters():
        source = sources.get(name)
        if source is None or source.shape != parameter.shape or name in excluded:
            inherited.fresh.append(name)
            continue
        parameter.copy_(source)
        inherited.copied.append(name)
    return inherited


def fraction_of_gain(*, baseline: float, teacher: float, student: float) -> float:
    """(student - baseline) / (teacher - baseline), the paper's "percent of teacher gain" / 100.

    Of losses, log perplexities or any score, all three of one kind. 0: no better than the baseline,
    which was trained without a teacher; 1: as good as the teacher; nan: teacher and baseline are
    equal.
    """
    gain = teacher - baseline
    return (student - baseline) / gain if gain else float("nan")


def _incompatible(student: SwitchTransformer, teacher: ModelConfig) -> set[str]:
    """Parameters whose values mean something else in the teacher although the shapes may agree."""
    config = student.config
    kinds: tuple[type[nn.Module], ...] = ()
    if (config.num_heads, config.d_kv) != (teacher.num_heads, teacher.d_kv):
        kinds += (AttentionBase,)
    if (config.activation, config.gated) != (teacher.activation, teacher.gated):
        kinds += (FFN,)
    return _parameters_in(student, kinds)


def _parameters_in(model: SwitchTransformer, kinds: tuple[type[nn.Module], ...]) -> set[str]:
    """Names of the parameters inside modules of these classes."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, kinds)
        for name, _ in module.named_parameters()
    }
