"""Configuration as frozen dataclasses: errors for users, TOML in and out, and differences.

Read first. Every other module declares its own config beside the thing it configures; this
one only knows how any of them is written to a file, read back and compared. An experiment's
file is complete: nothing in it depends on a default that a later version might change.
"""

import ast
import dataclasses
import inspect
import pkgutil
import re
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import tomli_w

T = TypeVar("T")

MAX_TOML_BYTES = 1 << 24
"""Larger settings are refused. Those of a run have 4 kB."""

NONE = "none"
"""How TOML, which has no null, says None here. No setting takes this word as a real value."""


class ConfigError(ValueError):
    """A setting that cannot work. The message names the value, the rule and the fix."""


class DataError(ValueError):
    """Text, or a file made from it, that cannot be used. Names the file, the rule and the fix."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit. Names the file, the rule and the fix."""


class _FieldHelp:
    """The docstring of a dataclass with the texts below its fields, put together when it is read:
    Python keeps no such texts, so they come from the source."""

    def __init__(self, summary: str) -> None:
        self.summary = summary

    def __get__(self, _: object, owner: type) -> str:
        try:
            texts = [text for base in reversed(owner.__mro__[:-1]) for text in field_texts(base)]
        except (OSError, TypeError):  # there is no source
            return self.summary
        return "\n    ".join([f"{self.summary}\n\nAttributes:", *texts]) + "\n"


def with_field_help(config: type[T]) -> type[T]:
    """The dataclass itself, whose `help` also says what stands below its fields."""
    config.__doc__ = _FieldHelp(inspect.cleandoc(config.__doc__ or ""))  # type: ignore[assignment]
    return config


def field_texts(config: type) -> list[str]:
    """ "name: text" of each field in the source of `config` that a text follows."""
    tree = ast.parse(inspect.cleandoc(inspect.getsource(config))).body[0]
    assert isinstance(tree, ast.ClassDef)
    texts: list[str] = []
    for field, below in pairwise(tree.body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(ast.Constant(str(text))):
                texts.append(f"{name}: " + inspect.cleandoc(text).replace("\n", "\n        "))
            case _:
                pass
    return texts


def to_dict(config: Any) -> dict[str, Any]:
    """`config`, a dataclass instance, as nested plain values; None becomes the word "none"."""
    return {
        field.name: _to_plain(getattr(config, field.name)) for field in dataclasses.fields(config)
    }


def from_dict(kind: type[T], values: Mapping[str, Any], *, where: str = "") -> T:
    """An instance of the dataclass `kind` from nested plain values. Raises ConfigError for an
    unknown name or a value of the wrong type, naming both."""
    hints = typing.get_type_hints(kind)
    fields = [field for field in dataclasses.fields(kind) if field.init]  # type: ignore[arg-type]
    known = [field.name for field in fields]
    for name in values:
        if name not in known:
            raise ConfigError(
                f"{where}{name} is not a setting of {kind.__name__}.\n"
                f"  Known settings: {', '.join(known)}."
            )
    for field in fields:
        optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if not (optional or field.name in values):
            raise ConfigError(f"{where}{field.name} is missing.\n  Add it: it has no default.")
    parsed = {name: checked(hints[name], value, f"{where}{name}") for name, value in values.items()}
    return kind(**parsed)


def to_toml(config: Any) -> str:
    """`config` as TOML text with every setting written out."""
    return tomli_w.dumps(to_dict(config))


def from_toml(kind: type[T], path: Path) -> T:
    """The dataclass `kind` read from the TOML file `path`. Raises ConfigError if it cannot be."""
    return from_dict(kind, read_toml(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in the TOML file `path`. Raises ConfigError if it cannot be read."""
    reason: object = "it is no ordinary file"
    try:
        # To open a pipe is to wait for its writer.
        if path.is_file() or not path.exists():
            if path.stat().st_size <= MAX_TOML_BYTES:
                return tomllib.loads(path.read_text(encoding="utf-8"))
            reason = f"it has more than {MAX_TOML_BYTES:,} bytes"
    except (OSError, ValueError) as error:  # TOML's and UTF-8's errors are ValueErrors
        reason = error
    except RecursionError:
        reason = "it is nested too deeply"
    raise ConfigError(f"{path} cannot be read as settings: {reason}.\n  Fetch or write it again.")


def differences(left: Any, right: Any) -> dict[str, tuple[Any, Any]]:
    """Every setting in which two configs differ: dotted name -> (left value, right value)."""
    a, b = flatten(to_dict(left)), flatten(to_dict(right))
    absent = "(absent)"
    return {
        name: (a.get(name, absent), b.get(name, absent))
        for name in sorted(a.keys() | b.keys())
        if a.get(name, absent) != b.get(name, absent)
    }


def check_at_least(config: Any, section: str, least: int, *names: str) -> None:
    """Raises ConfigError for the first setting of `names` below `least`. None passes."""
    _check(config, section, names, lambda value: value >= least, f"be at least {least}")
    _check(config, section, names, lambda value: value < 1 << 63, "be below 2^63")


def check_at_most(config: Any, section: str, most: int, *names: str) -> None:
    """Raises ConfigError for the first setting of `names` above `most`. None passes."""
    rule = f"be at most {most:,}: more is beyond what is built here"
    _check(config, section, names, lambda value: value <= most, rule)


def check_positive(config: Any, section: str, *names: str) -> None:
    """Raises ConfigError for the first setting of `names` that is 0 or less. None passes."""
    _check(config, section, names, lambda value: value > 0, "be positive")
    _check(config, section, names, lambda value: value < 3e38, "be finite in float32")


def check_rate(config: Any, section: str, *names: str) -> None:
    """Raises ConfigError for the first setting of `names` outside [0, 1). None passes."""
    _check(config, section, names, lambda value: 0 <= value < 1, "lie in [0, 1)")


_NO_NAME = re.compile("[\0\ud800-\udfff]|[^/]{256}")


def check_literals(config: Any, section: str) -> None:
    """Raises ConfigError for the first setting that is none of the words its type lists, or text
    that no file can hold."""
    for name, value in typing.cast("dict[str, Any]", vars(config)).items():
        words = typing.cast("tuple[Any, ...]", value if isinstance(value, tuple) else (value,))
        for word in words:
            if isinstance(word, str) and _NO_NAME.search(word):
                reason = "has a NUL, half a character, or a name of over 255 characters"
                raise ConfigError(f"{section}{name} = {word[:80]!r} {reason}.\n  Mend it.")
    for name, choices in _choices(config.__class__).items():
        value = getattr(config, name)
        several = isinstance(value, tuple)
        for word in typing.cast("tuple[Any, ...]", value) if several else (value,):
            # Where a type allows numbers or None as well, those are checked elsewhere.
            if (isinstance(word, str) or not choices.others) and word not in choices.words:
                listed = ", ".join(map(repr, choices.words))
                raise ConfigError(f"{section}{name} = {word!r} is not known.\n  Use {listed}.")


class Choices(NamedTuple):
    """The values that a setting's type lists, and whether it allows other types beside them."""

    words: tuple[Any, ...]
    others: bool


@cache
def _choices(kind: type) -> dict[str, Choices]:
    """Each setting of `kind` whose type has a Literal: `Literal[...]`, a tuple of them, or a union
    with one."""
    choices: dict[str, Choices] = {}
    for name, hint in typing.get_type_hints(kind).items():
        inner = typing.get_args(hint)[:1] if typing.get_origin(hint) is tuple else (hint,)
        members = [part for each in inner for part in _members(each)]
        literal = [part for part in members if typing.get_origin(part) is typing.Literal]
        if literal:
            words = tuple(word for part in literal for word in typing.get_args(part))
            choices[name] = Choices(words, others=len(literal) < len(members))
    return choices


def _members(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)


def _check(
    config: Any, section: str, names: Sequence[str], is_met: Callable[[float], bool], rule: str
) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not is_met(value):
            kind, fix = config.__class__, "Change it."  # a class has the defaults
            if hasattr(kind, name):
                fix = f"The default is {_to_plain(getattr(kind, name))}."
            raise ConfigError(f"{section}{name} = {value} must {rule}.\n  {fix}")


def import_named(name: str, label: str) -> Any:
    """The object that `name`, module:attribute, names, of the current folder or installed. Raises
    ConfigError, which begins with `label`, if it cannot be imported."""
    if (here := str(Path.cwd())) not in sys.path:  # as `python` does, and installed commands do not
        sys.path.insert(0, here)
    try:
        return pkgutil.resolve_name(name)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        reason = str(error)
        if not isinstance(error, ImportError | AttributeError):
            reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{label} {name!r} cannot be imported: {reason}.\n"
            f"  Searched: {here} and the installed packages."
        ) from error


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one; names are the keys that lead to a value, joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(typing.cast("Mapping[str, Any]", value), f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _to_plain(value: Any) -> Any:
    if value is None:
        return NONE
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_to_plain(item) for item in typing.cast("tuple[Any, ...]", value)]
    return value


def checked(hint: Any, value: Any, name: str) -> Any:
    """`value`, out of TOML or JSON, as the type `hint` of a setting. Raises ConfigError, naming
    `name`, if it is of another type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return checked(arguments[0], value, name)
    if origin in (typing.Union, types.UnionType):
        return _from_union(arguments, value, name)
    if origin is typing.Literal:
        if value in arguments:
            return value
        choices = ", ".join(repr(choice) for choice in arguments)
        raise ConfigError(f"{name} = {value!r} is not known.\n  Use {choices}.")
    if origin is tuple and isinstance(value, list):
        items = typing.cast("list[Any]", value)
        return tuple(checked(arguments[0], item, f"{name}[]") for item in items)
    if hint is Any:
        return value
    if origin is dict and isinstance(value, Mapping):
        entries = typing.cast("Mapping[str, Any]", value)
        return {key: checked(arguments[1], each, f"{name}.{key}") for key, each in entries.items()}
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        kind, values = typing.cast("type[Any]", hint), typing.cast("Mapping[str, Any]", value)
        return from_dict(kind, values, where=f"{name}.")
    if hint is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    label = getattr(hint, "__name__", str(hint))
    raise ConfigError(
        f"{name} = {value!r} should be of type {label}.\n  Write {_FORMS.get(label, f'a {label}')}."
    )


_FORMS = {
    "bool": "true or false",
    "int": "3, say",
    "float": "0.5, say",
    "str": "it in quotes",
    "tuple": "a list, in brackets",
}
"""How values of a type are written in TOML."""


def _from_union(choices: tuple[Any, ...], value: Any, name: str) -> Any:
    if (value is None or value == NONE) and type(None) in choices:
        return None
    errors: list[str] = []
    for choice in choices:
        if choice is type(None):
            continue
        try:
            return checked(choice, value, name)
        except ConfigError as error:
            errors.append(str(error))
    raise ConfigError(errors[0])
