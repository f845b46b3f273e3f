"""A plugin of pytest, used on demand: which messages of the package did no test provoke?

    python -m pytest -p support.messages -m "not gpu"

It lists every `raise` of a ConfigError, DataError or CheckpointError that was not reached. xdist's
workers and forked processes count; those that begin anew do not, such as support/ranks.py's.
"""

import ast
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

PACKAGE = Path(__file__).parents[2] / "switchworks"
KINDS = ("ConfigError", "DataError", "CheckpointError")
FOLDER = "SWITCHWORKS_MESSAGES"
"""The variable that names, to all processes, the folder with a file for each line that was
reached. Files are empty, so that a disk that a test has filled takes them."""

seen: set[str] = set()


def raises() -> dict[tuple[str, int], range]:
    """(file below the package, line) -> lines, of every raise of a message for users."""
    trees = {path: ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
    nodes = [(path, node) for path, tree in trees.items() for node in ast.walk(tree)]
    names = set(KINDS)
    for _, node in nodes:
        if isinstance(node, ast.ClassDef) and names & {ast.unparse(base) for base in node.bases}:
            names.add(node.name)
    return {
        (str(path.relative_to(PACKAGE)), node.lineno): range(node.lineno, node.end_lineno + 1)
        for path, node in nodes
        if isinstance(node, ast.Raise) and makes_message(node.exc, names)
    }


def makes_message(node: ast.AST | None, names: set[str]) -> bool:
    """Whether a call makes an error of the kinds `names`, itself or by a function that returns one;
    such functions, and arguments that hold a kind, are in lower case as no exception is."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return False
    return node.func.id in names or node.func.id.islower()


def note(error: ValueError, *args: Any) -> None:
    """Notes the lines of the package that are being run, the first time that they are."""
    ValueError.__init__(error, *args)
    for path, line in lines_of(sys._getframe(1)):
        place = f"{path}:{line}"
        if place not in seen:
            seen.add(place)
            Path(os.environ[FOLDER], place.replace("/", "|")).touch()


def lines_of(frame: Any) -> Iterator[tuple[str, int]]:
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            yield str(path.relative_to(PACKAGE)), frame.f_lineno
        frame = frame.f_back


def pytest_configure(config: pytest.Config) -> None:
    from switchworks import config as package

    if not hasattr(config, "workerinput"):  # workers inherit it
        os.environ[FOLDER] = mkdtemp()
    for kind in KINDS:
        getattr(package, kind).__init__ = note


def pytest_terminal_summary(terminalreporter: Any) -> None:
    folder, places = Path(os.environ[FOLDER]), raises()
    reached = {file.name.replace("|", "/") for file in folder.iterdir()}
    shutil.rmtree(folder)
    terminalreporter.section("messages that no test provoked")
    left = [
        f"{path}:{line}"
        for path, line in sorted(places)
        if reached.isdisjoint(f"{path}:{each}" for each in places[path, line])
    ]
    terminalreporter.write_line("\n".join([*left, f"{len(left)} of {len(places)}"]))
