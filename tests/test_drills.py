"""A few attempts of each drill of experiments/drills; `make drills` runs all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def run(script: str, *words: str) -> str:
    """What a drill prints. Fails if anything was lost."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXPERIMENTS / script), *words]
    result = subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result.stdout


@pytest.mark.parametrize("verb", [pytest.param("train", marks=pytest.mark.slow), "convert"])
def test_a_verb_that_is_killed_fails_or_has_no_room_ends_well_when_repeated(verb):
    assert ": 2 of 2 (2 killed)" in run("drills/crash.py", verb, "--most", "2", "--seed", "7")


def test_damaged_files_are_refused_or_made_again():
    assert "damage: a checkpoint: 3 of 3" in run("drills/damage.py", "--count", "3", "--seed", "1")


@pytest.mark.slow
def test_hostile_files_are_refused():
    printed = run("drills/hostile.py", "--count", "2", "--seed", "1")
    assert "hostile: our model, sealed again: 2 of 2" in printed


@pytest.mark.slow
def test_command_lines_that_nobody_meant_end_in_words():
    assert "random command lines: 15 of 15" in run(
        "drills/words.py", "--count", "15", "--seed", "3"
    )


@pytest.mark.slow
def test_of_two_processes_at_one_place_one_wins():
    assert "two processes: convert: 2 of 2" in run("drills/pairs.py", "convert", "--count", "2")


@pytest.mark.slow
def test_all_drills_together_write_the_page(tmp_path):
    run("drills/everything.py", "--share", "0.01", "--write", str(tmp_path / "page.md"))
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("# Reliability")
    assert "| **all** |" in text
    assert text.rstrip().endswith("Nothing.")
