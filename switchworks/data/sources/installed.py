"""Which packages an embedded corpus is read from: named ones and all they require, no others.

Tools that happen to be installed beside switchworks are not read, so that with the versions
pinned in constraints.txt a corpus is the same on every machine.
"""

import importlib.metadata
import re
from collections.abc import Iterable

from packaging.requirements import Requirement

Packages = dict[str, importlib.metadata.Distribution]


def installed(roots: Iterable[str]) -> Packages:
    """The installed distributions among `roots` and what they require, by normalised name."""
    there = {
        _normal(name): distribution
        for distribution in importlib.metadata.distributions()
        if (name := distribution.metadata["Name"])
    }
    found: Packages = {}
    wanted = [_normal(root) for root in roots]
    while wanted:
        name = wanted.pop()
        if name in found or name not in there:
            continue
        found[name] = there[name]
        for requirement in there[name].requires or []:
            needed = Requirement(requirement)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                wanted.append(_normal(needed.name))
    return found


def versions(packages: Packages) -> list[tuple[str, str]]:
    """(name, version) of each, sorted: what decides an embedded corpus."""
    return sorted((name, package.version) for name, package in packages.items())


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
