"""Long lists of like cases: some of them in `make test`, all the others in `make test-slow`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], fast: Collection[Any]) -> list[Any]:
    """The `cases`, of which all but those in `fast` are marked slow. An unknown one is an error."""
    cases = list(cases)
    unknown = [case for case in fast if case not in cases]
    assert not unknown, f"not among the cases: {unknown}"
    return [case if case in fast else slow(case) for case in cases]


def slow(case: Any) -> Any:
    """One value, or a tuple of the values of several arguments, marked slow."""
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
