"""Which packages an embedded corpus is read from: those named and all they require, no others.

Tools that happen to be installed beside switchworks are not read, so that with the versions
pinned in constraints.txt a corpus is the same on every machine.
"""

import importlib.metadata
import re
from collections.abc import Iterable

from packaging.requirements import Requirement

Packages = dict[str, importlib.metadata.Distribution]


def installed_packages(roots: Iterable[str]) -> Packages:
    """The installed distributions among `roots` and what they require, by normalised name."""
    available = {
        _normal(name): distribution
        for distribution in importlib.metadata.distributions()
        if (name := distribution.metadata["Name"])
    }
    packages: Packages = {}
    pending = [_normal(root) for root in roots]
    while pending:
        name = pending.pop()
        if name in packages or name not in available:
            continue
        packages[name] = available[name]
        for text in available[name].requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                pending.append(_normal(requirement.name))
    return packages


def versions(packages: Packages) -> list[tuple[str, str]]:
    """(name, version) of each, sorted: what an embedded corpus depends on."""
    return sorted((name, package.version) for name, package in packages.items())


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
