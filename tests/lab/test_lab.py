"""`switchworks lab`: what is trained, in which folders, and what is kept of it."""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from switchworks.cli.main import main
from switchworks.cli.parsing import parse_experiment
from switchworks.config import ConfigError, DataError
from switchworks.lab import (
    STUDIES,
    Arm,
    Runner,
    Study,
    jobs_of,
    known_runs,
    missing_jobs,
    read_results,
    write_results,
)
from switchworks.lab.results import losses
from switchworks.lab.runner import commit_of, progress
from switchworks.model.sizes import flops_per_token
from switchworks.recipes import find_recipe

ARMS = (
    Arm(name="dense", recipe="tiny", flags=("--model.routing", "none")),
    Arm(name="4 experts", recipe="tiny"),
)


@pytest.fixture
def study(corpus) -> Study:
    """Two arms of the recipe tiny, twenty steps and a branch of ten."""
    flags = ("--data.path", str(corpus), "--validate-every", "10", "--sample-every", "0")
    return Study(
        name="small",
        question="Does it run?",
        paper="Figure 0",
        arms=ARMS,
        seeds=(0, 1),
        steps=(10, 20),
        flags=(*flags, "--validation-batches", "1", "--optim.warmup-steps", "2"),
        minutes=1,
    )


def test_every_study_names_recipes_and_arms_once():
    for study in STUDIES.values():
        for arm in study.arms:
            find_recipe(arm.recipe)  # raises for one that there is not
        places = [training.folder for training in study.trainings(Path("runs"))]
        assert len(set(places)) == len(places) == len(study.arms) * len(study.seeds)


@dataclass(frozen=True)
class NoFlags:
    """An arm has settings alone."""


DEARER = ("top-2", "dense and as wide", "dense of 3.5 times", "experts in")
"""Arms that cost more in the paper, too (tables 1 and 10, figure 6), or are to: first words."""


@pytest.mark.parametrize("name", STUDIES)
def test_the_arms_of_a_study_are_experiments_of_equal_flops_per_token(name):
    """But for routers and for what `DEARER` names. Of other models the settings alone do not say
    what they cost."""
    study, flops = STUDIES[name], {}
    for arm in (arm for arm in study.arms if not arm.script):
        words = [arm.recipe, *study.flags, *arm.flags]
        experiment, _ = parse_experiment("train", words, NoFlags)
        data = experiment.data
        flops[arm.name] = flops_per_token(experiment.model, data.input_length, data.target_length)
    equal = {arm: number for arm, number in flops.items() if not arm.startswith(DEARER)}
    assert max(equal.values()) == pytest.approx(min(equal.values()), rel=0.03), equal


def test_an_arm_of_two_studies_is_trained_once(study, tmp_path):
    other = replace(study, name="other", question="And this?")
    folders = [[t.folder for t in each.trainings(tmp_path)] for each in (study, other)]
    assert folders[0] == folders[1]
    longer = replace(study, flags=(*study.flags, "--optim.lr", "0.5"))
    assert not {t.folder for t in longer.trainings(tmp_path)} & set(folders[0])


def test_the_first_seed_of_every_arm_comes_before_the_second_of_any(study, tmp_path):
    found = [(t.seed, t.arm.name) for t in study.trainings(tmp_path)]
    assert found == [(0, "dense"), (0, "4 experts"), (1, "dense"), (1, "4 experts")]


@pytest.mark.parametrize(
    "changed", [{"arms": (ARMS[0], ARMS[0])}, {"steps": (10, 5)}, {"steps": ()}]
)
def test_a_study_that_cannot_be_is_refused(study, changed):
    with pytest.raises(ConfigError):
        replace(study, **changed)


@pytest.mark.long
def test_a_run_and_its_branch_are_trained_and_their_results_kept(study, tmp_path, monkeypatch):
    one = replace(study, arms=ARMS[1:], seeds=(0,))
    said: list[str] = []
    jobs = jobs_of(one.trainings(tmp_path / "runs"))
    assert [(job.steps, job.is_branch) for job in jobs] == [(20, False), (10, True)]
    assert Runner(processes=2, say=said.append).run(jobs)
    assert said[-1].endswith("2 of 2 runs")
    results = write_results(one, tmp_path / "runs", tmp_path / "small.json")
    assert results == read_results(tmp_path / "small.json") | {
        key: results[key]
        for key in ("seeds", "steps", "arms")  # tuples there, lists in the file
    }
    (by_steps,) = losses(results, "4 experts").values()
    assert list(by_steps) == [10, 20]
    long, short = results["runs"]
    assert [row[0] for row in short["curve"]] == [10]
    assert long["curve"][0][3] != short["curve"][0][3]  # the short one has decayed by then
    assert long["commit"] == commit_of(Path(__file__).parent)
    assert long["command"].startswith("-m switchworks train tiny --seed 0 --optim.schedule rsqrt")
    assert progress(jobs[0]).startswith("step 20 of 20")
    monkeypatch.setitem(STUDIES, "small", one)
    monkeypatch.setattr("switchworks.lab.speed.ROUNDS", 1)
    words = ["--folder", str(tmp_path / "runs"), "--results", str(tmp_path)]
    assert main(["lab", "small", "--speed", *words]) == 0  # goes on from the finished run
    rates = read_results(tmp_path / "small.json")["tokens_per_second"]
    assert rates.keys() == {"4 experts"}
    assert rates["4 experts"] > 0
    again = write_results(one, tmp_path / "runs", tmp_path / "small.json")
    assert again["tokens_per_second"] == rates
    (more,) = replace(one, steps=(5, 10, 20)).trainings(tmp_path / "runs")
    assert jobs_of([more])[-1].is_ready  # its beginning was not kept, so it begins at step 0
    again = Runner(launch=("no-such-program",), say=said.append)
    assert again.run(jobs)  # nothing is left to do


def test_results_outlive_their_runs_and_spare_training_them_again(study, tmp_path):
    """Of two seeds the first was trained on another machine, whose file was brought along."""
    file, folder = tmp_path / "results.json", tmp_path / "runs"
    jobs = jobs_of(study.trainings(folder))
    first, second = ([job for job in jobs if job.training.seed == seed] for seed in study.seeds[:2])
    told = {"arm": "dense", "loss": 3.0}
    file.write_text(json.dumps({"runs": [told | {"run": job.name} for job in first]}))
    known = known_runs(file)
    assert missing_jobs([*first, *second], known) == second
    partly = dict(list(known.items())[1:])
    assert set(missing_jobs(first, partly)) == {
        job for job in first if job.training.trunk == first[0].training.trunk
    }
    results = write_results(study, folder, file)
    assert [run["run"] for run in results["runs"]] == [job.name for job in first]
    assert all(run["loss"] == 3.0 for run in results["runs"])


@pytest.mark.long
def test_what_is_at_work_when_the_time_is_over_saves(study, tmp_path):
    one = replace(study, arms=ARMS[1:], seeds=(0,), steps=(100_000,))
    (job,) = jobs_of(one.trainings(tmp_path))
    end = time.monotonic() + 300
    runner = Runner(say=lambda _: None)
    runner._start(job)
    while not (job.run_dir / "metrics.jsonl").exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    runner._stop()
    assert job.step > 0
    assert not job.is_done


def test_a_signal_that_ends_the_lab_ends_what_it_started(study, tmp_path):
    jobs = jobs_of(replace(study, seeds=(0,)).trainings(tmp_path / "runs"))
    pid = tmp_path / "pid"
    runner = Runner(launch=("sh", "-c", f"echo $$ > {pid}; exec sleep 60"), say=lambda _: None)
    end = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    end.start()
    with pytest.raises(KeyboardInterrupt):
        runner.run(jobs)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.parametrize(
    ("status", "how"), [(7, "failed"), (0, "was stopped"), (130, "was stopped")]
)
def test_a_run_that_fails_or_is_stopped_is_named_with_its_log(status, how, study, tmp_path):
    jobs = jobs_of(replace(study, seeds=(0,)).trainings(tmp_path))
    ended = sys.executable, "-c", f"raise SystemExit({status})"
    runner = Runner(launch=ended, say=lambda _: None)
    with pytest.raises(ConfigError, match=rf"dense-s0.* {how} before its end \(status {status}\)"):
        runner.run(jobs)


def test_the_command_lists_studies_with_what_is_done(tmp_path, capsys):
    assert main(["lab", "--folder", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in STUDIES)
    assert " 0 of " in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "no study 'nothing'"),
        (["speedup", "--arms", "many"], "speedup has no arm 'many'"),
        (["speedup", "--budget", "long"], "is no time"),
        (["--processes", "0"], "processes"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(words, message, tmp_path, capsys):
    assert main(["lab", *words, "--folder", str(tmp_path), "--results", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_call_whose_budget_is_over_says_that_more_is_to_do(tmp_path, capsys):
    words = ["lab", "speedup", "--budget", "0s", "--folder", str(tmp_path)]
    assert main([*words, "--results", str(tmp_path)]) == 3
    assert json.loads((tmp_path / "speedup.json").read_text())["runs"] == []
    assert "goes on with" in capsys.readouterr().out


def test_a_file_that_holds_no_results_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    for file in (tmp_path / "a.json", tmp_path / "none.json"):
        with pytest.raises(DataError, match="no results"):
            read_results(file)


def test_the_speed_of_what_was_not_trained_is_not_measured(tmp_path, capsys):
    words = ["lab", "rates", "--speed", "--folder", str(tmp_path), "--results", str(tmp_path)]
    assert main(words) == 2
    assert "rates has no finished run" in capsys.readouterr().err
