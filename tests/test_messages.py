"""Messages for users: each says how to mend what it refuses, and those unprovoked can be listed."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support.messages import KINDS, PACKAGE, raises

HAVE_IT_INSIDE = {
    "config.json describes no model that can be built: {error}": "that of a setting",
    "Corpus {name}: {error}": "that of the text",
    "{path}: {error}": "that of a language's code",
    "best.metric = {metric} is never measured: {reason}": "either of two reasons",
}
"""Messages whose fix is in the value that they end with."""


def messages(source: str) -> Iterator[str]:
    """The text of every message in `source` that is written there, with its values in braces. In
    disk.py the kind of error is an argument, `error`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id=name), args=[text, *_]) if name in (*KINDS, "error"):
                if isinstance(text, ast.Constant | ast.JoinedStr):
                    yield "".join(map(written, getattr(text, "values", [text])))


def written(part: ast.expr) -> str:
    return part.value if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"


def has_fix(message: str) -> bool:
    """Whether a second sentence or line follows what is wrong."""
    if message.endswith("{_FIX}"):
        return True
    return bool(re.search(r"\n|[.?] [A-Z0-9`\"-]", re.sub(r"\{[^{}]*\}", "x", message)))


def without_fix(source: str) -> list[str]:
    return [text for text in messages(source) if not has_fix(text) and text not in HAVE_IT_INSIDE]


def test_every_message_says_how_to_mend_it():
    left = {
        str(path.relative_to(PACKAGE)): lacking
        for path in sorted(PACKAGE.rglob("*.py"))
        if (lacking := without_fix(path.read_text(encoding="utf-8")))
    }
    assert not left


@pytest.mark.parametrize("kind", [*KINDS, "error"])
def test_a_message_that_leaves_one_alone_is_seen(kind):
    alone = f'raise {kind}(f"steps = {{steps}} must be positive, e.g. {{1 + 1}}.")'
    assert without_fix(alone) == ["steps = {steps} must be positive, e.g. {1 + 1}."]
    assert without_fix("raise ConfigError('It is so')") == ["It is so"]
    for fix in (" Use 1.", "\\n  Use 1.", "{_FIX}"):
        assert not without_fix(f'raise {kind}(f"steps = {{steps}} is none.{fix}")')


def test_no_message_is_excused_that_is_not_there():
    written_somewhere = {
        text for path in PACKAGE.rglob("*.py") for text in messages(path.read_text("utf-8"))
    }
    assert HAVE_IT_INSIDE.keys() <= written_somewhere


TWO = """
import multiprocessing
from pathlib import Path
from switchworks.config import read_toml
from switchworks.disk import read_text

def refuse(read):
    try:
        read(Path("/dev/null"))
    except ValueError:
        pass

def test_one():
    refuse(read_toml)

def test_another_in_a_process_of_its_own():
    child = multiprocessing.get_context("fork").Process(target=refuse, args=(read_text,))
    child.start()
    child.join()
"""


def test_the_plugin_lists_the_messages_that_no_test_provoked(tmp_path):
    (tmp_path / "test_two.py").write_text(TWO)
    command = [sys.executable, "-m", "pytest", "-p", "support.messages"]
    paths = f"{PACKAGE.parent}{os.pathsep}{PACKAGE.parent / 'tests'}"
    done = subprocess.run(
        [*command, "--rootdir", str(tmp_path), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
    )
    left = {line for line in done.stdout.splitlines() if re.fullmatch(r"\S+\.py:\d+", line)}
    places = {f"{path}:{line}" for path, line in raises()}
    assert done.returncode == 0, done.stdout
    assert sorted(place.split(":")[0] for place in places - left) == ["config.py", "disk.py"]
    assert left < places
    assert f"\n{len(left)} of {len(places)}\n" in done.stdout
