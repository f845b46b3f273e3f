"""Setting seams of a model for a while, and giving them their plain forms back."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

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
