"""experiments/scale.py with a tiny model."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "scale.py"


@pytest.mark.filterwarnings("ignore:Data has no positive values")  # so small is the model
def test_the_curves_have_a_row_for_each_number_of_ranks(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("scale", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    scale = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scale)
    settings = {"DOCS": tmp_path, "RANKS": [1, 2], "ROWS": {"tiny": 4}, "WIDTH": {"tiny": 1}}
    for name, value in settings.items():
        monkeypatch.setattr(scale, name, value)
    scale.write_curves()
    lines = (tmp_path / "scale.csv").read_text().splitlines()
    assert [line.split(",")[1:3] for line in lines[1:]] == [["1", "1x1x1"], ["2", "1x2x1"]]
    assert (tmp_path / "scale.png").exists()
