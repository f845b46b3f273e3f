"""The shapes in the package's signatures, checked once for every combination of shapes, in the
first calls of each test: a run repeats what its first steps call."""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Hashable, Sequence
from functools import partial, update_wrapper, wraps
from types import FunctionType
from typing import Any

import jaxtyping
import numpy as np
import torch

PLAIN = {bool, int, float, type(None), torch.dtype, torch.device, slice}
MANY = 64
CALLS = 2000
"""Looked at in each test. To look at all of them would take a tenth of the tests' time."""
left = CALLS

jaxtyped = jaxtyping.jaxtyped
seen: dict[Hashable, set[Hashable]] = {}


def start_checking() -> None:
    """Look at the next `CALLS` calls."""
    global left
    left = CALLS


def check_shapes(modules: Sequence[str]) -> None:
    """Every later import of `modules` has its annotations checked by beartype.

    jaxtyping checks every call, which is most of a tiny model's time. What a check says hangs on
    the types, shapes and dtypes alone, so each function is checked once for each of them.
    """
    jaxtyping.jaxtyped = checked_once
    jaxtyping.install_import_hook(modules, "beartype.beartype")


def checked_once(fn: Any = None, *, typechecker: Any) -> Any:
    """In place of `jaxtyping.jaxtyped`, in the code that its import hook writes."""
    if fn is None:
        return partial(checked_once, typechecker=typechecker)
    if isinstance(fn, classmethod | staticmethod):
        return type(fn)(checked_once(fn.__func__, typechecker=typechecker))
    if inspect.isclass(fn):
        if dataclasses.is_dataclass(fn) and "__init__" in vars(fn):
            fn.__init__ = remembering(fn.__init__, typechecker)
        return fn
    if isinstance(fn, FunctionType):
        return remembering(fn, typechecker)
    return jaxtyped(fn, typechecker=typechecker)


def remembering(fn: Any, typechecker: Any) -> Callable:
    sized = any("{" in str(hint) for hint in fn.__annotations__.values())  # by an argument
    marks = seen.setdefault((fn.__module__, fn.__qualname__, fn.__code__), set())
    checked = []

    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        global left
        if torch.compiler.is_compiling() or left == 0:
            return fn(*args, **kwargs)
        left -= 1
        given = None if sized else mark(("**", kwargs, *args) if kwargs else args)
        if given is None or given not in marks:
            if not checked:
                checked.append(jaxtyped(fn, typechecker=typechecker))
            out = checked[0](*args, **kwargs)
            made = mark((out,))
            if given is not None and made is not None:
                marks.update((given, (given, made)))
            return out
        out = fn(*args, **kwargs)
        made = mark((out,))
        if (given, made) not in marks:
            jaxtyped(returning(out, fn), typechecker=typechecker)(*args, **kwargs)
            marks.add((given, made))
        return out

    return call


def returning(out: Any, fn: Any) -> Callable:
    """A function with the signature of `fn` that returns `out`."""

    def same(*_: Any, **__: Any) -> Any:
        return out

    code, closure = same.__code__, same.__closure__
    return update_wrapper(FunctionType(code, fn.__globals__, closure=closure), fn)


def mark(values: Collection) -> Hashable:
    """Equal for collections that no annotation tells apart; None if that is not known."""
    marks: list[Hashable] = []
    for value in values:
        kind = type(value)
        if kind in PLAIN:
            marks.append(kind)
        elif isinstance(value, torch.Tensor):
            shape = value.shape
            for size in shape:
                if type(size) is not int:  # a symbol
                    return None
            marks += (kind, value.dtype, shape)
        elif kind is str:
            marks.append(value)
        elif isinstance(value, np.ndarray):
            marks += (kind, value.dtype, value.shape)
        elif isinstance(value, tuple | list | dict):
            parts = (*value, *value.values()) if isinstance(value, dict) else value
            inner = None if len(value) > MANY else mark(parts)
            if inner is None:
                return None
            marks += (kind, inner)
        elif isinstance(value, Collection):
            return None
        else:
            marks.append(kind)
    return tuple(marks)
