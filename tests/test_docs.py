"""The pages that say which test holds what: every test they name is there."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from switchworks import RoutingConfig, SwitchFFN
from switchworks.cli.main import main
from switchworks.data.rows.span_corruption import corrupted_lengths, raw_length
from switchworks.model import Routing

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


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


TOUR = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
TOKENS = [
    [cell.strip() for cell in row.split("|")[1:-1]]
    for row in re.findall(r"^\| [A-F] \|.*$", TOUR, flags=re.MULTILINE)
]
"""Rows of the table of six tokens: token, logits, softmax, expert, position, served, gate, answer,
output."""


@pytest.fixture
def six_tokens() -> tuple[torch.Tensor, Routing]:
    """Outputs and routing of a layer with the logits and the answers that the page has."""
    logits = torch.tensor([[float(number) for number in row[1].split()] for row in TOKENS])
    answers = {int(row[3]): float(row[7]) for row in TOKENS if row[7]}
    routing = RoutingConfig(experts=3, capacity_factor=1.0, min_capacity=1, jitter=0.0)
    layer = SwitchFFN(6, 6, routing, d_out=1)
    with torch.no_grad():
        layer.router.weight.copy_(logits.T)
        layer.experts.w_in.copy_(torch.eye(6).expand(3, 6, 6))
        for expert, answer in answers.items():
            layer.experts.w_out[expert].fill_(answer)
        outputs, report = layer(torch.eye(6))
    return outputs.flatten(), report


def test_the_six_tokens_of_the_tour_take_the_way_that_the_layer_gives_them(six_tokens):
    outputs, report = six_tokens
    routes = report.routes
    expected = {
        3: [str(expert) for expert in routes.expert[0].tolist()],
        4: [str(slot) for slot in routes.slot[0].tolist()],
        5: ["yes" if kept else "no" for kept in routes.kept[0]],
        6: [f"{gate:.3f}" for gate in routes.gate[0].tolist()],
        8: [f"{y:.2f}" for y in outputs.tolist()],
    }
    assert {place: [row[place] for row in TOKENS] for place in expected} == expected
    assert [row[5] for row in TOKENS] == ["yes", "yes", "yes", "yes", "no", "yes"]


def test_the_balance_loss_of_the_tour_is_the_layer_s(six_tokens):
    _, report = six_tokens
    logits = torch.tensor([[float(number) for number in row[1].split()] for row in TOKENS])
    probs = logits.softmax(dim=-1)
    for row, softmax in zip(TOKENS, probs.tolist(), strict=True):
        assert row[2] == " ".join(f"{p:.3f}" for p in softmax)
    rows = dict(re.findall(r"^\| (f|P|f \* P) \|(.*)\|$", TOUR, flags=re.MULTILINE))
    f, mean, product = (
        [float(cell) for cell in rows[name].split("|")] for name in ("f", "P", "f * P")
    )
    assert f == [round(share, 3) for share in report.load.tolist()]
    assert mean == [round(share, 3) for share in probs.mean(dim=0).tolist()]
    assert product == [round(share, 4) for share in (report.load * probs.mean(dim=0)).tolist()]
    total = re.search(r"3 \* \(([\d.]+) \+ ([\d.]+) \+ ([\d.]+)\) = (\d\.\d+)", TOUR)
    assert total is not None
    assert [float(number) for number in total.groups()[:3]] == product
    assert float(total[4]) == round(3 * sum(product), 3) == round(report.balance.item(), 3)
    assert f"so {report.loss.item():.5f} joins" in TOUR


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["cff-version"] == "1.2.0"
    assert (citation["title"], citation["version"], citation["license"]) == (
        project["name"],
        project["version"],
        project["license"],
    )
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Fedus", "Zoph", "Shazeer"]
    assert paper["title"].startswith("Switch Transformers: Scaling to Trillion Parameter Models")
