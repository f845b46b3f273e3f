"""`switchworks lab`: experiments that answer a question, trained over seeds and lengths."""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from switchworks.cli.parsing import parse_flags
from switchworks.config import ConfigError, check_at_least

if TYPE_CHECKING:
    from switchworks.lab import Study, Training


@dataclass(frozen=True)
class LabFlags:
    """Trains what is missing of a study, and writes its results. Without a name: all studies there
    are, and what is done of each. `lab report` writes pages of all results. A call that was
    stopped, or reached its budget, goes on when it is repeated."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Studies, by name, or "report". With --budget and none named: all studies."""
    folder: Path = Path("runs/lab")
    """Where runs are."""
    results: Path = Path("experiments/results")
    """Where NAME.json goes."""
    page: Path = Path("docs/results.md")
    """With report: the page, beside which its pictures and an HTML file go."""
    speed: bool = False
    """Instead of training: measure the tokens per second of all arms with a finished run, in turns,
    on one thread."""
    seeds: int | None = None
    """Train only the first so many seeds."""
    arms: tuple[str, ...] = ()
    """Train only these arms, by name."""
    processes: int = os.cpu_count() or 1
    """Trainings at a time, of one thread each."""
    budget: str | None = None
    """Stop after this time: 8h, 90m. What is at work is saved."""
    launch: str | None = None
    """What runs `-m switchworks train`: `srun -n 1 python`, or torchrun with its flags. Default:
    the Python of this command."""

    def __post_init__(self) -> None:
        check_at_least(self, "--", 1, "processes", "seeds")

    @property
    def seconds(self) -> float:
        """The budget; infinite if there is none. Raises ConfigError if it is no time."""
        if self.budget is None:
            return float("inf")
        number, unit = self.budget[:-1], self.budget[-1:]
        units = {"h": 3600.0, "m": 60.0, "s": 1.0}
        try:
            return float(number) * units[unit]
        except (KeyError, ValueError):
            raise ConfigError(f"--budget {self.budget} is no time.\n  Say 8h or 90m.") from None


def run(words: list[str]) -> int:
    """List the studies, or work on some; 0 if all that was asked for is done, else 3."""
    flags = parse_flags(LabFlags, "lab", words)
    from switchworks.lab import STUDIES

    if flags.names == ("report",):
        return _report(flags)
    if not flags.names and flags.budget is None:
        for study in STUDIES.values():
            print(_line(study, flags))
        return 0
    unknown = [name for name in flags.names if name not in STUDIES]
    if unknown:
        raise ConfigError(f"there is no study {unknown[0]!r}.\n  Studies: {', '.join(STUDIES)}.")
    studies = [STUDIES[name] for name in flags.names or STUDIES]
    if flags.speed:
        for study in studies:
            _measure(study, flags)
        return 0
    return 0 if _train(studies, flags) else 3


def _report(flags: LabFlags) -> int:
    from switchworks.lab import read_results, write_pages

    files = sorted(flags.results.glob("*.json"))
    if not files:
        raise ConfigError(f"{flags.results} has no results.\n  `switchworks lab NAME` makes them.")
    html = flags.page.with_suffix(".html")
    write_pages([read_results(file) for file in files], flags.page, html)
    print(f"{flags.page.resolve()}\n{html.resolve()}")
    return 0


def _measure(study: "Study", flags: LabFlags) -> None:
    import torch

    from switchworks.lab import jobs_of, tokens_per_second, write_rates
    from switchworks.training import machine

    torch.set_num_threads(1)
    # The models of scripts are no part of switchworks, which cannot open them.
    jobs = [job for job in jobs_of(_trainings(study, flags)) if not job.training.arm.script]
    runs = {job.training.arm.name: job.run_dir for job in reversed(jobs) if job.is_done}
    if not runs:
        raise ConfigError(
            f"{study.name} has no finished run below {flags.folder}, whose speed to measure.\n"
            f"  Train first: switchworks lab {study.name}."
        )
    rates = tokens_per_second(runs)
    for name, rate in rates.items():
        print(f"{name:<16} {rate:8.0f} tokens/s")
    write_rates(flags.results / f"{study.name}.json", rates, machine.describe())


def _trainings(study: "Study", flags: LabFlags) -> "Iterator[Training]":
    names = [arm.name for arm in study.arms]
    unknown = [name for name in flags.arms if name not in names]
    if unknown:
        raise ConfigError(f"{study.name} has no arm {unknown[0]!r}.\n  Arms: {', '.join(names)}.")
    for training in study.trainings(flags.folder):
        wanted = not flags.arms or training.arm.name in flags.arms
        if wanted and (flags.seeds is None or training.seed in study.seeds[: flags.seeds]):
            yield training


def _train(studies: "Sequence[Study]", flags: LabFlags) -> bool:
    from switchworks.lab import Runner, jobs_of, known_runs, missing_jobs, write_results

    jobs = [
        job
        for study in studies
        for job in missing_jobs(jobs_of(_trainings(study, flags)), known_runs(_file(study, flags)))
    ]
    launch = [sys.executable] if flags.launch is None else shlex.split(flags.launch)
    runner = Runner(launch=launch, processes=flags.processes, seconds=flags.seconds)
    try:
        return runner.run(jobs)
    finally:
        for study in studies:
            file = _file(study, flags)
            write_results(study, flags.folder, file)
            print(f"results {file}")


def _file(study: "Study", flags: LabFlags) -> Path:
    return flags.results / f"{study.name}.json"


def _line(study: "Study", flags: LabFlags) -> str:
    from switchworks.lab import jobs_of, known_runs

    jobs, known = jobs_of(study.trainings(flags.folder)), known_runs(_file(study, flags))
    done = sum(job.is_done or job.name in known for job in jobs)
    hours = study.minutes * len(study.seeds) / 60 / flags.processes
    return f"{study.name:<20} {done:>3} of {len(jobs):>3} runs  {hours:5.1f} h  {study.question}"
