"""Which parameters a setting means: a kind, or a pattern over the names, or all but those."""

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
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

_KINDS: Mapping[type[nn.Module], str] = {
    Attention: "attention",
    SwitchAttention: "attention",
    RelativeBias: "attention",
    FFN: "ffn",
    Experts: "experts",
    Router: "routers",
    RMSNorm: "norms",
    nn.Embedding: "embeddings",
}
KINDS = tuple(dict.fromkeys(_KINDS.values()))
"""The words that name parameters by what they are for. "ffn" are the dense ones; "embeddings" is
the table and, where there is one, the untied head."""


def kinds_of(model: SwitchTransformer) -> dict[str, str]:
    """The kind of every parameter, by its full name, in the model's order."""
    kinds = {name: "embeddings" for name, _ in model.named_parameters()}
    for path, module in model.named_modules():  # from outside in: the innermost kind stays
        kind = next((kind for cls, kind in _KINDS.items() if isinstance(module, cls)), None)
        if kind is not None:
            kinds |= {f"{path}.{name}": kind for name, _ in module.named_parameters()}
    return kinds


def select(model: SwitchTransformer, entries: Sequence[str], setting: str) -> set[str]:
    """Names of the parameters that `entries` mean together.

    An entry is a kind (`KINDS`), or a pattern as in file names: * stands for anything, dots
    included. With "all-but-" before it, it says what is left out: of several such entries each
    leaves out its own, and the others are then added. Raises ConfigError, naming `setting` and
    near names, for an entry that means nothing in this model.
    """
    kinds = kinds_of(model)
    no_decay, named = set[str](), set[str]()
    for entry in entries:
        plain = entry.removeprefix(ALL_BUT)
        (named if plain == entry else no_decay).update(_meant(plain, kinds, setting))
    every = set(kinds) if any(entry.startswith(ALL_BUT) for entry in entries) else set[str]()
    return (every - no_decay) | named


def _meant(entry: str, kinds: Mapping[str, str], setting: str) -> list[str]:
    found = [
        name for name, kind in kinds.items() if (entry in (kind, name)) or fnmatchcase(name, entry)
    ]
    if found:
        return found
    if entry in KINDS:
        there = [kind for kind in KINDS if kind in kinds.values()]
        raise ConfigError(
            f"{setting} names {entry}, and this model has none. It has {', '.join(there)}."
        )
    near = sorted(kinds, key=lambda name: _unlikeness(entry, name))[:3]
    raise ConfigError(
        f"{setting} has {entry!r}, which matches no parameter of this model.\n"
        f"  Near it: {', '.join(near)}.\n"
        f"  A pattern covers the whole name, as in *.{near[0].rpartition('.')[2]}; "
        f"kinds are {', '.join(KINDS)}."
    )


def _unlikeness(entry: str, name: str) -> float:
    """Small for a name that looks like `entry`, its wildcards not counted."""
    fragments = [part for part in entry.replace("?", "*").split("*") if part] or [entry]
    longest = max(fragments, key=len)
    shared = SequenceMatcher(None, longest, name, autojunk=False)
    block = shared.find_longest_match()
    return -block.size - SequenceMatcher(None, entry, name, autojunk=False).ratio()
