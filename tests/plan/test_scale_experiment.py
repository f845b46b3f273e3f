"""experiments/scale.py with a tiny model."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from switchworks.recipes.tiny import tiny
from switchworks.training import Experiment

SCRIPT = Path(__file__).parents[2] / "experiments" / "scale.py"


def shallow() -> Experiment:
    """The recipe `tiny` with one block in each stack, a sparse one."""
    recipe = tiny()
    routing = replace(recipe.model.routing, every=1)
    return replace(recipe, model=replace(recipe.model, num_layers=1, routing=routing))


@pytest.fixture
def scale(tmp_path, monkeypatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "find_recipe", {"tiny": shallow}.get)
    settings = {"DOCS": tmp_path, "RANKS": [2], "ROWS": {"tiny": 4}, "WIDTH": {"tiny": 1}}
    for name, value in {**settings, "DEVICES": [2]}.items():
        monkeypatch.setattr(script, name, value)
    return script


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # as parallel/apply.py does
@pytest.mark.filterwarnings("ignore:Data has no positive values")  # so small is the model
def test_the_curves_have_a_row_for_each_number_of_ranks(scale, tmp_path):
    scale.write_curves()
    lines = (tmp_path / "scale.csv").read_text().splitlines()
    assert [line.split(",")[1:3] for line in lines[1:]] == [["2", "1x2x1"]]
    assert (tmp_path / "scale.png").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_the_meshes_that_fit_are_printed_for_each_machine(scale, capsys):
    scale.print_fitting_meshes()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [["tiny", "tpuv3", "2"], ["tiny", "h100", "2"]]
    assert all("--mesh." in line for line in lines)
