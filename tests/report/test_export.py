"""Figures for a paper: every chart of the page, and the numbers that are drawn."""

import csv
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from switchworks.cli.main import main
from switchworks.report import write_figures, write_report
from switchworks.report.charts import smooth
from switchworks.report.runs import read_run


@pytest.fixture(scope="module")
def small_run(tmp_path_factory) -> Path:
    """A run of which the page has three charts and a map."""
    folder = tmp_path_factory.mktemp("small") / "a-run"
    folder.mkdir()
    lines = [
        {"step": step, "train/loss": 5 - step / 30, "train/lr": 1 / step}
        | {"load/encoder.1": [0.1, 0.2 + step / 300, 0.7 - step / 300]}
        for step in range(1, 60)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def written(small_run) -> Path:
    write_figures([small_run], small_run / "figures")
    return small_run / "figures"


def table_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_curve_and_map_of_the_page_is_a_figure(small_run, written):
    page = write_report([small_run], written / "page.html").read_text()
    titles = re.findall(r"<figcaption><b>(.*?)</b>", page)
    names = sorted(re.sub(r"[^\w.]+", "-", title).lower() for title in titles)
    assert names == ["busiest-expert", "encoder.1", "learning-rate", "loss-by-step"]
    for kind in ("svg", "pdf", "csv"):
        assert sorted(path.stem for path in written.glob(f"*.{kind}")) == names


def test_the_table_has_the_numbers_that_are_drawn(small_run, written):
    run = read_run(small_run)
    steps, losses = run.series("train/loss")
    rows = table_of(written / "loss-by-step.csv")
    assert {row["curve"] for row in rows} == {"training"}
    assert [float(row["step"]) for row in rows] == steps.tolist()
    assert [float(row["value"]) for row in rows] == losses.tolist()
    assert [float(row["drawn"]) for row in rows] == pytest.approx(smooth(losses).tolist())


def test_the_table_of_a_map_has_its_columns_and_its_bars(small_run, written):
    steps, loads = read_run(small_run).loads()["encoder.1"]
    rows = table_of(written / "encoder.1.csv")
    over = [row for row in rows if row["part"] == "over training"]
    end = [float(row["times the even share"]) for row in rows if row["part"] == "at the end"]
    assert len(over) == loads.size
    assert {float(row["step"]) for row in over} == set(steps.tolist())
    assert end == pytest.approx(loads[-6:].mean(axis=0).tolist())  # the last tenth


def test_a_figure_names_its_run_and_has_none_of_the_page_s_styles(small_run, written):
    text = (written / "learning-rate.svg").read_text()
    ElementTree.fromstring(text)
    assert small_run.name in text
    assert "var(" not in text
    assert "class=" not in text
    assert (written / "learning-rate.pdf").read_bytes().startswith(b"%PDF")


def test_the_same_run_gives_the_same_files(small_run, written, tmp_path):
    write_figures([small_run], tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (written / path.name).read_bytes(), path.name


def test_the_command_writes_page_and_figures(small_run, tmp_path, capsys):
    other = tmp_path / small_run.name
    other.mkdir()
    (other / "metrics.jsonl").write_bytes((small_run / "metrics.jsonl").read_bytes())
    words = [str(small_run), str(other), "--output", str(tmp_path / "both.html")]
    assert main(["report", *words, "--figures", str(tmp_path / "figures")]) == 0
    assert "figures" in capsys.readouterr().out
    assert (tmp_path / "both.html").exists()
    assert len(list((tmp_path / "figures").glob("*encoder.1*.svg"))) == 2  # one of each run


def test_figures_are_of_the_page_of_runs_alone(small_run, tmp_path, capsys):
    words = ["report", str(small_run), "--figures", str(tmp_path / "x"), "--compression"]
    assert main(words) == 2
    assert "are those of the page of runs" in capsys.readouterr().err
