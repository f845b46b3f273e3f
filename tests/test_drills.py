"""A few attempts of each drill of experiments/drills; `make drills` runs all."""

import json
import os
import subprocess
import sys
from dataclasses import replace
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


@pytest.fixture
def drills(monkeypatch) -> None:
    """The drills can be imported: in a process of their own most of the time goes by importing."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS / "drills"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["settings", "texts", "batches"])
def test_random_settings_texts_and_batches_are_trained_on_or_refused(name, drills, tmp_path):
    import configs

    configs.make_site(tmp_path / "site")
    trial, _ = configs.DRILLS[name]
    found = [trial(number, seed=1, site=tmp_path / "site") for number in range(1, 9)]
    assert [lost for _, lost in found if lost] == []
    assert {kind for kind, _ in found} <= {"trained", "refused", "the same"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["a checkpoint", "a model", "an experiment", "a table, tsv"])
def test_files_changed_by_what_they_consist_of_are_read_or_refused(name, drills, tmp_path):
    import readers

    reader = readers.Reader(name, tmp_path / "site", seed=1)
    assert [lost for _, lost in map(reader.attempt, range(8)) if lost] == []


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
def test_a_soak_looks_at_its_process_and_generates_from_its_exports(tmp_path):
    words = ["--minutes", "0.5", "--every", "5", "--json", str(tmp_path / "soak.json")]
    script = [sys.executable, str(EXPERIMENTS / "drills/soak.py"), *words]
    subprocess.run(script, capture_output=True, check=False, timeout=600)  # too short to hold
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["steps"] == found["rows"][-1]["step"] > 0
    assert found["generated"] > 0
    assert len(found["held"]) == 4


def test_a_soak_says_what_grew_and_what_slowed_down():
    sys.path.insert(0, str(EXPERIMENTS / "drills"))
    try:
        from soak import Minute, verdicts
    finally:
        sys.path.pop(0)
    calm = [Minute(n, 10 * n, 500.0, 11, 19, 1000.0, 50.0) for n in range(1, 21)]
    assert list(verdicts(calm).values()) == [True] * 4
    grown = [replace(row, megabytes=500 + row.minutes) for row in calm]
    assert list(verdicts(grown).values()) == [False, True, True, True]
    busy = [replace(row, tokens_per_second=500.0, products_per_second=25.0) for row in calm[:9]]
    assert all(verdicts([*busy, *calm[9:]]).values())  # all of the machine was slower
    slow = [replace(row, tokens_per_second=1000.0 - 10 * row.minutes) for row in calm]
    assert list(verdicts(slow).values()) == [True, True, True, False]
    left = [replace(row, files=11 + row.step // 100, threads=19 + row.step // 90) for row in calm]
    assert list(verdicts(left).values()) == [True, False, False, True]


@pytest.mark.slow
def test_all_drills_together_write_the_page(tmp_path):
    run("drills/everything.py", "--share", "0.01", "--write", str(tmp_path / "page.md"))
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("# Reliability")
    assert "| **all** |" in text
    assert text.rstrip().endswith("Nothing.")
