"""Types and shapes are checked in the first calls of each test: a run repeats them step by step,
and to check every one of them would take a third of the tests' time."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from beartype import beartype
from jaxtyping import config

CALLS = 1000
_left = CALLS


def start_checking() -> None:
    """Check the next `CALLS` calls."""
    global _left
    _left = CALLS
    config.update("jaxtyping_disable", False)


def check_types(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, for jaxtyping's import hook, which calls the result in place of `function`."""
    check = cache(partial(beartype, function))  # most functions are never called by a worker

    def counted(*arguments: Any, **named: Any) -> Any:
        global _left
        _left -= 1
        if _left == 0:
            config.update("jaxtyping_disable", True)
        return check()(*arguments, **named)

    return counted
