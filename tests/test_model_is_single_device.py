"""The model is code for one device; whatever makes it larger or faster comes from outside."""

import ast
from pathlib import Path

import pytest

import switchworks.model

FILES = sorted(Path(switchworks.model.__file__).parent.glob("*.py"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)

ALLOWED = (
    *("collections", "contextlib", "dataclasses", "functools", "math", "typing", "zlib"),
    *("torch", "numpy", "jaxtyping"),
    *("switchworks.config", "switchworks.batch", "switchworks.model"),
)


def imports(source: str) -> set[str]:
    """Every module that `source` imports from."""
    nodes = list(ast.walk(ast.parse(source)))
    whole = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return whole | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def mentions(source: str) -> set[str]:
    """Every dotted name that `source` imports or uses."""
    names = imports(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@each_file
def test_no_file_of_the_model_mentions_torch_distributed(path):
    names = mentions(path.read_text(encoding="utf-8"))
    assert not [name for name in names if is_within(name, "torch.distributed")]


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.tensor import DTensor",
        "import torch\ndef f(x):\n    return torch.distributed.get_rank()",
    ],
)
def test_the_check_sees_every_way_to_reach_torch_distributed(source):
    assert any(is_within(name, "torch.distributed") for name in mentions(source))


@each_file
def test_the_model_imports_torch_the_batch_and_the_config_and_nothing_else(path):
    names = imports(path.read_text(encoding="utf-8"))
    assert all(any(is_within(name, package) for package in ALLOWED) for name in names)


def test_there_are_files_to_check():
    names = {path.stem for path in FILES}
    assert names > {"attention", "dispatch", "experts", "routing", "switch_ffn", "transformer"}


def lines_of_code(source: str) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    text: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant):
            text |= set(range(value.lineno, (value.end_lineno or 0) + 1))
    lines = source.splitlines()
    numbered = ((number, line.strip()) for number, line in enumerate(lines, 1))
    return sum(bool(line) and line[0] != "#" and number not in text for number, line in numbered)


def test_the_model_can_be_read_in_one_sitting():
    """At most 1,200 lines of code in short files; settings, closed-form sizes and the face are not
    counted."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in FILES}
    assert max(len(source.splitlines()) for source in sources.values()) < 350
    counts = {name: lines_of_code(source) for name, source in sources.items()}
    aside = ("config", "routing_config", "sizes", "__init__")
    assert sum(counts[name] for name in counts if name not in aside) <= 1200


def test_lines_of_code_are_neither_blank_nor_comment_nor_docstring():
    source = (
        '"""Doc\n\nstring."""\n\n# why\nx = 1  # x\n\ndef f():\n    "Doc."\n    return """a\nb"""\n'
    )
    assert lines_of_code(source) == 4
