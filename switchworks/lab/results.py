"""What the trainings of a study came to, as JSON: all that tables and pictures are made of."""

import json
import platform
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from switchworks.config import DataError
from switchworks.disk import write_json
from switchworks.lab.runner import Job, jobs_of
from switchworks.lab.study import Study
from switchworks.report import read_run

CURVE = ("step", "tokens", "seconds", "val/loss")
ABOUT = (
    *("parameters", "active_parameters", "flops_per_token"),
    *("machine", "text_digest", "train_tokens"),
)
RATES = ("tokens_per_second", "measured_on")
ROUTING = ("train/confidence", "train/dropped", "train/balance")


def collect(study: Study, folder: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """The results of all runs of `study` that are finished below `folder`, or are `known` by name
    from before: runs are large, and their results outlive them."""
    jobs = jobs_of(study.trainings(folder))
    runs = {job.name: _result(job) if job.is_done else known.get(job.name) for job in jobs}
    return {
        "study": study.name,
        "question": study.question,
        "paper": study.paper,
        "arms": [asdict(arm) for arm in study.arms],
        "seeds": study.seeds,
        "steps": study.steps,
        "versions": {name: version(name) for name in ("switchworks", "torch", "numpy")},
        "python": platform.python_version(),
        "runs": [{"run": name} | run for name, run in runs.items() if run is not None],
    }


def _result(job: Job) -> dict[str, Any]:
    run = read_run(job.run_dir)
    record = json.loads(job.run_dir.with_suffix(".json").read_text("utf-8"))
    curve = [[row[key] for key in CURVE] for row in run.rows if "val/loss" in row]
    return {
        "arm": job.training.arm.name,
        "seed": job.training.seed,
        "steps": job.steps,
        "loss": run.last("val/loss"),
        "tokens": run.last("tokens"),
        "seconds": run.last("seconds"),
        "curve": curve,
        "routing": {key: value for key in ROUTING if (value := run.settled(key)) is not None},
        **{key: run.about.get(key) for key in ABOUT},
        **record,
    }


def write_results(study: Study, folder: Path, file: Path) -> dict[str, Any]:
    """Collect the results of `study` and write them to `file`, which keeps its rates, and results
    of runs that are no longer there."""
    results = collect(study, folder, known_runs(file))
    if file.exists():
        results |= {key: value for key, value in read_results(file).items() if key in RATES}
    write_json(file, results)
    return results


def known_runs(file: Path) -> dict[str, Any]:
    """The results in `file` by the names of runs; none if there is no file."""
    runs = read_results(file)["runs"] if file.exists() else []
    return {run["run"]: run for run in runs if "run" in run}


def missing_jobs(jobs: Iterable[Job], known: Container[str]) -> list[Job]:
    """Those of `jobs` that are to be trained: of a training whose runs are all `known`, none."""
    jobs = list(jobs)
    missing = {job.training.trunk for job in jobs if job.name not in known}
    return [job for job in jobs if job.training.trunk in missing]


def write_rates(file: Path, rates: Mapping[str, float], machine: str) -> None:
    """Add the tokens per second of each arm, measured on `machine`, to the results in `file`."""
    write_json(file, read_results(file) | dict(zip(RATES, (rates, machine), strict=True)))


def read_results(file: Path) -> dict[str, Any]:
    """The results in `file`. Raises DataError if they are none."""
    try:
        results, reason = json.loads(file.read_text("utf-8")), "it has no runs"
    except (OSError, ValueError) as error:
        results, reason = None, str(error)
    if not isinstance(results, dict) or "runs" not in results:
        raise DataError(
            f"{file} holds no results of a study: {reason}.\n  `switchworks lab NAME` makes them."
        )
    return results


def losses(results: Mapping[str, Any], arm: str) -> dict[int, dict[int, float]]:
    """Of `arm`: seed -> steps -> the loss at the end of a run of that length."""
    by_seed: dict[int, dict[int, float]] = {}
    for run in _runs(results, arm):
        by_seed.setdefault(run["seed"], {})[run["steps"]] = run["loss"]
    return {seed: dict(sorted(by_steps.items())) for seed, by_steps in sorted(by_seed.items())}


def _runs(results: Mapping[str, Any], arm: str) -> Iterable[dict[str, Any]]:
    return (run for run in results["runs"] if run["arm"] == arm)
