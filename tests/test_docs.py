"""The pages that say which test holds what: every test they name is there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from switchworks.cli.main import main
from switchworks.data.rows.span_corruption import corrupted_lengths, raw_length

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


@cache
def functions_of(file: str) -> set[str]:
    """The names of the test functions of `file`, wherever below tests/; none if there is no such
    file."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob(file)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def named_in(page: Path) -> set[tuple[str, str]]:
    """(file, function) of every `test_x.py::test_y`, and of every test_x: `y`, `z`."""
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(test_\w+\.py)::(\w+)", text))
    for module, names in re.findall(r"\b(test_\w+): (`\w+`(?:, `\w+`)*)", text):
        named |= {(f"{module}.py", f"test_{name}") for name in re.findall(r"\w+", names)}
    return named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page):
    missing = [
        f"{file}::{name}" for file, name in sorted(named_in(page)) if name not in functions_of(file)
    ]
    assert not missing


@pytest.mark.parametrize("page", ["paper.md", "statements.md", "interop.md"])
def test_pages_of_facts_name_tests(page):
    assert len(named_in(ROOT / "docs" / page)) > 20


def test_every_statement_has_a_test_or_says_what_is_missing():
    lines = (ROOT / "docs" / "statements.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    rows = [row for row in rows if row[0].isdigit()]
    assert sorted(int(number) for number, *_ in rows) == list(range(1, 32))
    assert all(tests or missing for _, _, tests, missing in rows)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_to_a_file(page):
    links = re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


DATA = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_example_of_a_row_prints_what_the_page_says(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", DATA, flags=re.DOTALL)
    (printed,) = re.findall(r"```text\n(.*?)```", DATA, flags=re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out == printed


def test_the_lengths_on_the_page_about_data_are_those_that_rows_have():
    rows = [tuple(map(int, row)) for row in re.findall(r"\| (\d+) \| (\d+) \| (\d+) \|", DATA)]
    assert len(rows) == 5
    for inputs, raw, targets in rows:
        assert raw_length(inputs, 0.15, 3.0) == raw
        assert corrupted_lengths(raw, 0.15, 3.0) == (inputs, targets)


def test_the_command_for_long_rows_is_understood(capsys):
    (command,) = re.findall(r"\$ switchworks train (.*?)\n", DATA)
    words = command.replace("--run-dir runs/long ", "").split()
    assert main(["explain", *words]) == 0
    assert "4096 tokens compete" in capsys.readouterr().out
