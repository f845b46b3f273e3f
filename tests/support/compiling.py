"""torch.compile inside a test's own process, without inductor's C++ compiler."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch


@contextmanager
def compiling(backend: str | Callable = "aot_eager") -> Iterator[None]:
    """torch.compile traces afresh, and by `backend`, which warns of nothing that torch does."""
    torch._dynamo.reset()
    with (
        patch.object(torch, "compile", partial(torch.compile, backend=backend)),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()
