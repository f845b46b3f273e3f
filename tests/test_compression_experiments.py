"""The scripts that make the tables of docs/smaller.md, on a tiny run."""

import json
from dataclasses import replace

import pytest
from support.scripts import run_script

from switchworks.recipes import RECIPES
from switchworks.recipes.tiny import tiny
from switchworks.training import Experiment


def tiny_dense() -> Experiment:
    """The dense twin of `tiny`."""
    return replace(tiny(), model=replace(tiny().model, routing=None))


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Calls a script of experiments/ with words, in a folder of its own; what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RECIPES, "tiny_dense", tiny_dense)
    return run_script


def test_the_cost_of_rounding_is_measured(script, tiny_run, tmp_path):
    said = script("quantise.py", str(tiny_run), "--groups", "16", "--held-out", "1", "--out", "q")
    rows = json.loads((tmp_path / "q" / "table.json").read_text())
    assert [row["weights"] for row in rows][1:] == ["int8", "int8-dynamic", "int4, groups of 16"]
    assert rows[3]["bytes"] < rows[1]["bytes"] < rows[0]["bytes"] / 2
    assert all(abs(row["more"]) < (0.02 if "4" in row["weights"] else 0.005) for row in rows)
    assert "| int8 |" in said


@pytest.mark.slow
def test_fewer_experts_are_measured_with_and_without_recovery(script, tiny_run, corpus, tmp_path):
    words = [str(tiny_run), "--batches", "1", "--held-out", "1", "--out", "f", "--threads", "1"]
    words += ["--recover", "1", "--recipe", "tiny"]
    said = script("fewer_experts.py", *words, "--data.path", str(corpus))
    table = json.loads((tmp_path / "f" / "table.json").read_text())
    assert list(table) == ["4", "2", "1"]
    assert set(table["4"]) == {"as it is", "as it is, trained on"}
    assert set(table["1"]) == {"prune", "prune, recovered", "merge", "merge, recovered"}
    assert "| merge, recovered | " in said
    with pytest.raises(SystemExit, match="f holds results of recover 1, now 0"):
        script("fewer_experts.py", str(tiny_run), "--batches", "1", "--out", "f", "--threads", "1")


@pytest.mark.parametrize(
    ("which", "runs"),
    [
        (
            ["--table", "6", "--stored", "8"],
            ["teacher", "baseline", "student", "plain", "weights", "weights_only", "stored 8"],
        ),
        (
            ["--table", "7", "--experts", "2", "4"],
            [
                "baseline",
                "teacher, 2 experts",
                "student of 2",
                "teacher, 4 experts",
                "student of 4",
            ],
        ),
    ],
)
def test_the_tables_of_the_paper_are_trained(which, runs, script, corpus, tmp_path):
    words = ["tiny", "--out", "d", "--steps", "2", "--threads", "1"]
    words += ["--sample-every", "0", "--data.path", str(corpus), *which]
    script("distillation.py", *words)
    rows = json.loads((tmp_path / "d" / f"table_{which[1]}.json").read_text())
    assert [row["run"] for row in rows] == runs


def test_table_6_goes_on_with_the_teacher_and_the_student_of_table_7(
    script, corpus, tmp_path, capsys
):
    words = ["tiny", "--out", "d", "--steps", "2", "--threads", "1"]
    words += ["--sample-every", "0", "--data.path", str(corpus), "--experts", "2"]
    script("distillation.py", *words, "--table", "7")
    left = {path: path.stat().st_mtime_ns for path in tmp_path.glob("d/*/*/metrics.jsonl")}
    said = script("distillation.py", *words, "--table", "6")
    assert len(left) == 3
    assert all(path.stat().st_mtime_ns == then for path, then in left.items())
    assert "| weights_only |" in said
    with pytest.raises(SystemExit, match="holds results of flags"):
        script("distillation.py", *words, "--table", "6", "--optim.lr", "0.5")
    with pytest.raises(SystemExit):
        script("distillation.py", *words, "4", "--table", "6")
    assert "several --experts are for --table 7" in capsys.readouterr().err


@pytest.mark.slow
def test_a_fine_tuned_pair_has_its_dense_one_taught_the_task(script, corpus, tmp_path):
    lines = [f"ball {i} is {hue},{hue == 'red'}\n" for i in range(100) for hue in ("red", "blue")]
    (tmp_path / "hues.csv").write_text("text,warm\n" + "".join(lines))
    pair = ["tiny", "--seeds", "0"]
    shared = ["--threads", "1", "--sample-every", "0", "--evaluate-every", "1"]
    task = "hues=hues.csv:text:warm"
    flags = ["--pretrain.steps", "2", "--pretrain.data.path", str(corpus)]
    flags += ["--tune.steps", "2", "--scratch.steps", "1"]
    script("finetune.py", *pair, "--tasks", task, "--out", "tuned", *flags, *shared)
    words = [*pair, "--table", "8", "--tuned", "tuned", "--task", task, "--out", "t", *shared]
    said = script("distillation.py", *words, "--steps", "2")
    rows = json.loads((tmp_path / "t" / "table_8.json").read_text())
    names = ["teacher", "baseline", "student", "student with the teacher's weights"]
    assert [row["run"] for row in rows] == names
    assert all(0 <= row["score"] <= 100 for row in rows)
    assert "| seed | run | validation score | of the teacher's gain | validation loss | " in said
    assert all({"loss", "gain kept by loss"} <= set(row) for row in rows)
    with pytest.raises(SystemExit, match="differ in steps and cannot be compared"):
        script("distillation.py", *words, "--steps", "3", "--out", "u")
