"""Leaving out losses and routing statistics, for a model that decodes or is a teacher.

They take a dozen small operations a switch layer, which beside the work of one token is much, and
a pass over all logits, which beside a small teacher is.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager

from jaxtyping import Float, Int
from torch import Tensor

from switchworks.fast.seams import Change, swapped
from switchworks.model import Routes, Routing, SwitchFFN, SwitchTransformer


def skip_losses(model: SwitchTransformer) -> AbstractContextManager[None]:
    """While inside, `model` computes the same logits and plans; every loss and statistic is 0."""
    return swapped(without_losses(model))


def without_losses(model: SwitchTransformer) -> Iterator[Change]:
    """The seams that `skip_losses` sets."""
    yield model, "cross_entropy", _no_loss
    for layer in model.switch_layers.values():
        yield layer, "reporter", no_statistics


def _no_loss(
    logits: Float[Tensor, "B T V"], _targets: Int[Tensor, "B T"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    zero = logits.new_zeros(())
    return zero, zero


def no_statistics(
    _layer: SwitchFFN, logits: Tensor, _probs: Tensor, _choice: Tensor, _real: Tensor, plan: Routes
) -> Routing:
    """In the place of a switch layer's reporter: the plan, and zeros."""
    zero, load = logits.new_zeros(()), logits.new_zeros(logits.shape[-1])
    return Routing(zero, zero, zero, load, zero, zero, zero, plan)
