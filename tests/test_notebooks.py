"""Every cell of every notebook runs, in order, on small models."""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib import pyplot

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))
FEWER = {"STEPS, WIDTH, EXPERTS = 300, 64, 8": "STEPS, WIDTH, EXPERTS = 4, 16, 4"} | {
    "PRETRAIN, TUNE = 300, 200": "PRETRAIN, TUNE = 4, 4"
}
"""Sizes of the first cells, and what the test puts in their place."""


def code_of(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_notebook(notebook: Path) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": notebook.stem}
    matplotlib.use("agg")
    for cell in code_of(notebook):
        for size, small in FEWER.items():
            cell = cell.replace(size, small)
        exec(compile(cell, notebook.name, "exec"), names)
    pyplot.close("all")
    return names


@pytest.mark.slow
def test_the_notebook_on_routing_counts_every_token_once():
    names = run_notebook(NOTEBOOKS[1])
    assert names["model"].config.routing.experts == 4
    counted = sum(sum(letters.values()) for letters in names["counts"])
    assert counted >= 8 * 300
    assert sum(names["routing"].load.tolist()) == pytest.approx(1)


@pytest.mark.slow
def test_the_notebook_on_fine_tuning_measures_both_runs():
    names = run_notebook(NOTEBOOKS[0])
    for run in names["runs"].values():
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
        assert re.search(r'"task/reviews/accuracy": \d', text)
    assert sum(names["shares"].values()) == pytest.approx(1)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_is_kept_without_outputs_and_small(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    assert notebook.stat().st_size < 20_000
    sizes = [line for line in code_of(notebook)[0].splitlines() if line in FEWER]
    assert len(sizes) == 1
