"""Setting seams of a model for a while, and giving them their plain forms back.

A model that decodes or is a teacher leaves out losses and routing statistics.

Letters: G groups, S tokens per group, E experts.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from switchworks.model import Routes, Routing, SwitchFFN, SwitchTransformer

Change = tuple[nn.Module, str, Any]
"""A module, the name of a seam of it (`switchworks.model.SEAMS`), and what to put there."""


@contextmanager
def swapped(changes: Iterable[Change]) -> Iterator[None]:
    """Inside, the seams are as `changes` say; afterwards as before.

    A seam that is so already is left to whoever set it: of two threads that decode with one model
    the first to end restores nothing that the other changed.
    """
    before: list[Change] = []
    for module, name, new in changes:
        if getattr(module, name) is not new:
            before.append((module, name, vars(module).get(name)))
            setattr(module, name, new)
    try:
        yield
    finally:
        for module, name, old in before:
            reset(module, name)
            if old is not None:
                setattr(module, name, old)


def reset(module: nn.Module, *names: str) -> None:
    """Gives seams of this one module their plain forms, which are attributes of its class."""
    for name in names:
        vars(module).pop(name, None)


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
    return Routing(zero, zero, zero, load, load, zero, zero, zero, plan)


class RoutedBatch(NamedTuple):
    """What one switch layer did with a batch."""

    layer: SwitchFFN
    logits: Float[Tensor, "G S E"]
    """The router's, in float32 and without jitter."""
    real: Bool[Tensor, "G S"]
    """False at padding."""
    routes: Routes


@contextmanager
def routes_recorded(model: SwitchTransformer) -> Iterator[dict[str, RoutedBatch]]:
    """While inside, what each switch layer did last, by its name, in place of statistics."""
    routed: dict[str, RoutedBatch] = {}

    def record(name: str, layer: SwitchFFN, *given: Any) -> Routing:
        logits, _probs, _choice, real, routes = given
        routed[name] = RoutedBatch(layer, logits.float(), real, routes)
        return no_statistics(layer, *given)

    changes = [(layer, "reporter", partial(record, n)) for n, layer in model.switch_layers.items()]
    with swapped(changes):
        yield routed
