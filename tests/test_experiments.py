"""Every script in experiments/ runs at its smallest; scripts with more to hold have own files."""

import argparse
import ast
import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image as images
import pytest
from support.scripts import EXPERIMENTS, run_script

from switchworks.recipes import RECIPES

TESTS = Path(__file__).parent
SCRIPTS = sorted(
    path.relative_to(EXPERIMENTS).as_posix()
    for path in EXPERIMENTS.rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)


@cache
def names_in_calls(file: Path) -> set[str]:
    """The strings in `file` that are no docstring: arguments, paths and members of lists; and the
    drills that it imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    prose = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    constants = [node for node in nodes if isinstance(node, ast.Constant) and id(node) not in prose]
    imported = (
        alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
    )
    drills = {f"drills/{name}.py" for name in imported}
    return drills | {node.value for node in constants if isinstance(node.value, str)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_run_by_a_test(script):
    assert len(SCRIPTS) > 10
    assert any(script in names_in_calls(file) for file in TESTS.rglob("test_*.py"))


@pytest.fixture
def tiny_pair(tiny_experiment, tmp_path, monkeypatch):
    """Recipes `small` and `small_dense` on the small corpus; the working folder is a new one."""
    small = replace(tiny_experiment, steps=4, validate_every=2, sample_every=0, batch_size=4)
    monkeypatch.setitem(RECIPES, "small", lambda: small)
    dense = replace(small, model=replace(small.model, routing=None))
    monkeypatch.setitem(RECIPES, "small_dense", lambda: dense)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("seeds", "together"), [("01", []), ("0", ["--together"])])
def test_a_pair_is_compared_over_seeds(tiny_pair, seeds, together):
    said = run_script("pair.py", "small", "--out", "pairs", "--seeds", *seeds, *together)
    rows = re.findall(r"\| (\d) \| [\d.]+ \| [\d.]+ \| [+-][\d.]+ \|", said)
    assert rows == list(seeds)
    assert re.search(r"^gain: mean [+-]\d\.\d{4}, least [+-]\d\.\d{4}$", said, re.MULTILINE)


def test_a_pair_that_is_never_validated_is_refused(tiny_pair):
    words = ["--seeds", "0", "--out", "pairs", "--validate-every", "0"]
    with pytest.raises(SystemExit, match="no validation loss"):
        run_script("pair.py", "small", *words)


def test_upcycled_models_are_trained_on_beside_their_dense_one(tmp_path):
    said = run_script("upcycling.py", str(tmp_path / "runs"), "--steps", "2", "--more", "1")
    losses = dict(re.findall(r"^(\w\S*) +validation loss ([\d. ]+)$", said, re.MULTILINE))
    assert list(losses) == ["continued", "no_limit", "factor_2", "factor_1.25", "scratch"]
    assert len(re.findall(r"^ +dropped [\d.]+%", said, re.MULTILINE)) == 4


def test_a_step_is_timed_in_one_process(tmp_path):
    script = runpy.run_path(str(EXPERIMENTS / "weak_scaling.py"))
    flags = argparse.Namespace(recipe="tiny", rows=4, steps=1, axis="data", overlap=1)
    script["one_rank"](0, 1, 0, flags, tmp_path / "figures", together=False)
    seconds, share = map(float, (tmp_path / "figures").read_text().split())
    assert seconds > 0
    assert share == 0  # one process has nothing to communicate


@pytest.mark.slow
def test_a_recipe_is_weighed_in_one_and_in_two_processes():
    """Spawned processes import the script by its path, so it runs in a process of its own."""
    words = ["tiny", "--rows", "4", "--steps", "1", "--axis", "data"]
    done = subprocess.run(
        [sys.executable, str(EXPERIMENTS / "weak_scaling.py"), *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = re.findall(r"^(\d.*?) +[\d.]+ +[\d.]+% +[\d.]+%$", done.stdout, re.MULTILINE)
    assert names == ["1", "2, independent", "2"]


def test_the_routing_of_a_text_is_drawn_token_by_token(tiny_run, tmp_path):
    output = tmp_path / "routing.png"
    words = ["routing", str(tiny_run), "--layer", "encoder.1", "--output", str(output)]
    assert run_script("pictures.py", *words).strip() == str(output)
    assert images.imread(output).shape[1] > 1000


def test_the_curves_of_a_pair_are_drawn(tiny_run, tmp_path):
    output = tmp_path / "curve.png"
    run_script("pictures.py", "curve", str(tiny_run), str(tiny_run), "--output", str(output))
    assert images.imread(output).shape[2] == 4


def test_the_drawing_of_the_switch_layer_is_the_one_that_the_script_makes(tmp_path):
    output = tmp_path / "layer.svg"
    run_script("pictures.py", "layer", "--output", str(output))
    drawn = output.read_text(encoding="utf-8")
    assert drawn == (EXPERIMENTS.parent / "docs" / "layer.svg").read_text(encoding="utf-8")
    assert drawn.count("<rect") == 2 + 6 + 6 + 5  # ground and router, slots, tokens, served ones
    assert ElementTree.fromstring(drawn).tag.endswith("svg")


@pytest.mark.parametrize("optimizer", ["adafactor-fixed", "adafactor-relative", "adamw"])
def test_transformers_t5_is_trained_on_the_rows_of_a_run(optimizer, tiny_run, tmp_path):
    out = tmp_path / "rival.jsonl"
    words = [str(tiny_run), "--optimizer", optimizer, "--rate", "3e-3", "--steps", "12"]
    output = run_script("rival.py", *words, "--every", "4", "--out", str(out))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert output.count(" of ") == 3
    if optimizer != "adafactor-relative":  # whose rate is next to nothing at first
        assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
