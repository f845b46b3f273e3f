"""A model of which only the logits are wanted: one that decodes, or teaches.

Losses and routing statistics take a dozen small operations a switch layer, which beside the work
of one token is much, and a pass over all logits, which beside a small teacher is.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from jaxtyping import Float, Int
from torch import Tensor

from switchworks.model import Routes, Routing, SwitchFFN, SwitchTransformer


@contextmanager
def skip_losses(model: SwitchTransformer) -> Iterator[None]:
    """While inside, `model` computes the same logits, and every loss and statistic it gives is 0.

    Tokens go to the same experts, and plans are reported as ever. Afterwards all is as before, also
    where another thread decodes at the same time: each puts back what it took away.
    """
    layers = [one for one in model.switch_layers.values() if one.reporter is not no_statistics]
    reporters, cross_entropy = [layer.reporter for layer in layers], model.cross_entropy
    model.cross_entropy = _no_loss
    for layer in layers:
        layer.reporter = no_statistics
    try:
        yield
    finally:
        if cross_entropy is not _no_loss:
            model.cross_entropy = cross_entropy
        for layer, reporter in zip(layers, reporters, strict=True):
            layer.reporter = reporter


def _no_loss(
    logits: Float[Tensor, "B T V"],
    targets: Int[Tensor, "B T"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    none = logits.new_zeros(())
    return none, none


def no_statistics(
    _layer: SwitchFFN, logits: Tensor, _probs: Tensor, _choice: Tensor, _real: Tensor, plan: Routes
) -> Routing:
    """In the place of a switch layer's reporter: the plan, and zeros."""
    none, load = logits.new_zeros(()), logits.new_zeros(logits.shape[-1])
    return Routing(none, none, none, load, none, none, none, plan)
