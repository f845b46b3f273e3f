"""experiments/kept.py: an experiment goes on with its own runs, and with no others."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
from kept import begun, finished, is_finished

sys.path.pop(0)


def test_a_finished_run_is_taken_as_it_is(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    assert begun("tiny", run, ["--steps", "3"]) is None
    assert finished("tiny", run, ["--steps", "3"]) == run


def test_a_run_of_other_flags_is_refused_with_both(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    begun("tiny", run, ["--steps", "3"])
    with pytest.raises(SystemExit, match=r"holds results of flags --steps 3, now --steps 4"):
        finished("tiny", run, ["--steps", "4"])
    with pytest.raises(SystemExit, match=r"recipe tiny, now quickstart"):
        begun("quickstart", run, ["--steps", "3"])


def test_a_run_that_fails_ends_the_experiment(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match=r"run did not end well; the same command goes on"):
        finished("no_such_recipe", run, [])
    assert not is_finished(run)
