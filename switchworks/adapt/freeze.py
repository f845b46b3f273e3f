"""Parameters by name, a kind, a pattern over the names or all but those, and which are trained."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from switchworks.config import ConfigError
from switchworks.model import (
    FFN,
    Attention,
    Experts,
    RelativeBias,
    RMSNorm,
    Router,
    SwitchAttention,
    SwitchTransformer,
)

ALL_BUT = "all-but-"

_KINDS: Mapping[str, tuple[type[nn.Module], ...]] = {
    "attention": (Attention, SwitchAttention, RelativeBias),
    "ffn": (FFN,),
    "experts": (Experts,),
    "routers": (Router,),
    "norms": (RMSNorm,),
    "embeddings": (nn.Embedding,),
}
KINDS = tuple(_KINDS)
"""Kinds of parameters. "ffn" are the dense FFNs; "embeddings" are the table and, where there is
one, the untied head."""


def kinds_of(model: SwitchTransformer) -> dict[str, str]:
    """The kind of every parameter, by its full name, in the model's order."""
    kinds = {name: "embeddings" for name, _ in model.named_parameters()}
    for path, module in model.named_modules():  # parents first, so that the innermost kind stays
        kind = next((kind for kind, types in _KINDS.items() if isinstance(module, types)), None)
        if kind is not None:
            kinds |= {f"{path}.{name}": kind for name, _ in module.named_parameters()}
    return kinds


def select(model: SwitchTransformer, entries: Sequence[str], setting: str) -> set[str]:
    """Names of the parameters that any of `entries` selects.

    An entry is a kind (`KINDS`), or a pattern as in file names: * stands for anything, dots
    included. The entries with "all-but-" before them together select all parameters but theirs.
    Raises ConfigError, naming `setting` and similar names, for an entry without a match.
    """
    kinds = kinds_of(model)
    excluded, named = set[str](), set[str]()
    for entry in entries:
        plain = entry.removeprefix(ALL_BUT)
        (named if plain == entry else excluded).update(_matches(plain, kinds, setting))
    every = set(kinds) if any(entry.startswith(ALL_BUT) for entry in entries) else set[str]()
    return (every - excluded) | named


def freeze_parameters(model: SwitchTransformer, entries: Sequence[str]) -> None:
    """Set `requires_grad` to False for the parameters that `entries` select (see `select`). Raises
    ConfigError for an entry without a match, or if nothing is left to train."""
    frozen = select(model, entries, "freeze")
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"freeze = {' '.join(entries)} leaves nothing to train.\n"
            "  Name fewer, or those to train, as in --freeze all-but-experts."
        )


def _matches(entry: str, kinds: Mapping[str, str], setting: str) -> list[str]:
    matches = [
        name for name, kind in kinds.items() if (entry in (kind, name)) or fnmatchcase(name, entry)
    ]
    if matches:
        return matches
    if entry in KINDS:
        present = [kind for kind in KINDS if kind in kinds.values()]
        raise ConfigError(
            f"{setting} names {entry}, and this model has none. It has {', '.join(present)}."
        )
    near = get_close_matches(entry, list(kinds), n=3, cutoff=0.0)
    raise ConfigError(
        f"{setting} has {entry!r}, which matches no parameter of this model.\n"
        f"  Near it: {', '.join(near)}.\n"
        f"  A pattern covers the whole name, as in *.{near[0].rpartition('.')[2]}; "
        f"kinds are {', '.join(KINDS)}."
    )
