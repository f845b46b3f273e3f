"""Runs the trainings of studies: several processes, resumable, within a budget of time.

Each training is an ordinary `switchworks train` in a process of its own with one thread, so what
runs beside it changes how long it takes and nothing else. A process that is stopped saves, and the
next call goes on with it.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import gcd
from pathlib import Path

from switchworks import checkpoint
from switchworks.config import ConfigError
from switchworks.disk import write_json
from switchworks.lab.study import Training

POLL_SECONDS = 0.5
STATUS_SECONDS = 60.0
RECORD = "lab.json"
"""In a run directory: what was called, and of which commit."""


@dataclass(frozen=True)
class Job:
    """One run of a training: its longest, or a branch of that."""

    training: Training
    steps: int

    @property
    def run_dir(self) -> Path:
        return self.training.run_dir(self.steps)

    @property
    def name(self) -> str:
        """The end of its path: of what is trained, and how long."""
        return "/".join(self.run_dir.parts[-2:])

    @property
    def is_branch(self) -> bool:
        return self.run_dir != self.training.trunk

    @property
    def is_done(self) -> bool:
        return (self.run_dir / "report.html").exists()  # written last

    @property
    def checkpoint(self) -> Path:
        """The trunk's checkpoint that a branch begins with."""
        step = self.training.branches_at(self.steps)
        return self.training.trunk / "checkpoints" / f"step_{step:08d}"

    @property
    def is_ready(self) -> bool:
        trunk = Job(self.training, self.training.steps[-1])
        begun = self.run_dir.exists() or self.checkpoint.is_dir()
        return not self.is_branch or begun or trunk.is_done

    @property
    def step(self) -> int:
        """The last that was saved."""
        return max(checkpoint.steps_in(self.run_dir / "checkpoints"), default=0)

    def command(self) -> list[str]:
        """The words after `python`, to start the run or to go on with it."""
        program = self.training.arm.script or ("-m", "switchworks")
        words = [*program, "train", *self.training.flags(self.steps)]
        steps = self.training.steps
        if not self.is_branch and len(steps) > 1:
            begins = [self.training.branches_at(each) for each in steps[:-1]]
            words += ["--checkpoint-every", str(gcd(*begins)), "--keep-checkpoints", "0"]
        begun = (self.run_dir / "experiment.toml").exists()
        return [*words, "--threads", "1", *(["--resume"] if begun else [])]

    def prepare(self) -> None:
        """Give a branch its beginning: the trunk's settings and state. Writes all or nothing.
        Nothing if the trunk kept no such checkpoint, having been trained for other lengths: then
        the branch is a run from step 0, with the same result."""
        if not self.is_branch or self.run_dir.exists() or not self.checkpoint.is_dir():
            return
        trunk, aside = self.training.trunk, self.run_dir.with_suffix(".part")
        shutil.rmtree(aside, ignore_errors=True)
        (aside / "checkpoints").mkdir(parents=True)
        shutil.copytree(self.checkpoint, aside / "checkpoints" / self.checkpoint.name)
        for name in ("experiment.toml", "about.json"):
            shutil.copy(trunk / name, aside / name)
        begin = self.training.branches_at(self.steps)
        with (aside / "metrics.jsonl").open("w", encoding="utf-8") as file:
            for line in (trunk / "metrics.jsonl").read_text("utf-8").splitlines():
                if json.loads(line)["step"] <= begin:
                    file.write(line + "\n")
        aside.rename(self.run_dir)


def jobs_of(trainings: Iterable[Training]) -> list[Job]:
    """The runs of `trainings`: of each its longest, then its branches."""
    return [Job(training, steps) for training in trainings for steps in reversed(training.steps)]


def commit_of(folder: Path) -> str | None:
    """The git commit of the checkout that `folder` is in, with -dirty if files differ from it."""
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except OSError:
        return None
    return done.stdout.strip() or None


def progress(job: Job) -> str:
    """How far a run is, and how long it still takes, as its last line of metrics says."""
    try:
        lines = (job.run_dir / "metrics.jsonl").read_text("utf-8").splitlines()
        last = next(line for line in map(json.loads, reversed(lines)) if "seconds_left" in line)
    except (OSError, ValueError, StopIteration):
        return "not begun to train"
    return f"step {last['step']} of {job.steps}, {last['seconds_left'] / 60:.0f} min left"


@contextmanager
def _as_ctrl_c() -> Iterator[None]:
    """Inside, signals that would end this process and not those it started act as Ctrl-C does."""
    names = signal.SIGTERM, signal.SIGHUP
    previous = [signal.signal(name, signal.default_int_handler) for name in names]
    try:
        yield
    finally:
        for name, handler in zip(names, previous, strict=True):
            signal.signal(name, handler)


@dataclass
class Runner:
    """Works off jobs, some at a time."""

    launch: Sequence[str] = (sys.executable,)
    """What runs `-m switchworks ...`: python, or `srun -n 1 python`, or torchrun with its flags."""
    processes: int = 1
    seconds: float = float("inf")
    """After so long no job is started, and those at work are told to save and stop."""
    say: Callable[[str], None] = print
    _running: dict[Path, tuple[Job, subprocess.Popen]] = field(default_factory=dict)

    def run(self, jobs: Sequence[Job]) -> bool:
        """Work off `jobs`; whether all are done. Raises ConfigError if one fails, naming its log.
        Ctrl-C, SIGTERM or a closed terminal lets those at work save."""
        end = time.monotonic() + self.seconds
        told = time.monotonic()
        with _as_ctrl_c(), self._stopping():
            while time.monotonic() < end:
                waiting = [j for j in jobs if not j.is_done and j.run_dir not in self._running]
                if not waiting and not self._running:
                    break
                for job in [job for job in waiting if job.is_ready]:
                    if len(self._running) < self.processes:
                        self._start(job)
                time.sleep(POLL_SECONDS)
                self._reap(jobs)
                if time.monotonic() - told > STATUS_SECONDS:
                    told = time.monotonic()
                    for job, _ in self._running.values():
                        self.say(f"       {job.run_dir}, {progress(job)}")
        missing = sum(not job.is_done for job in jobs)
        if missing:
            self.say(f"the time is over; the same command goes on with {missing} runs")
        return not missing

    def _start(self, job: Job) -> None:
        job.prepare()
        log = job.run_dir.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [*self.launch, *job.command()]
        record = {
            "command": shlex.join(job.command()),
            "launch": [Path(self.launch[0]).name, *self.launch[1:]],
            "commit": commit_of(Path(__file__).parent),
        }
        with log.open("a", encoding="utf-8") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment
            )
        write_json(log.with_suffix(".json"), record)
        self._running[job.run_dir] = job, process
        self.say(f"begun  {job.run_dir}, at step {job.step} of {job.steps}")

    def _reap(self, jobs: Sequence[Job]) -> None:
        for path, (job, process) in list(self._running.items()):
            if process.poll() is None:
                continue
            del self._running[path]
            if not job.is_done:
                # Told to stop from outside, a run saves and ends with these.
                ending = "was stopped" if process.returncode in (0, 130, 143) else "failed"
                raise ConfigError(
                    f"{path} {ending} before its end (status {process.returncode}).\n"
                    f"  {path.with_suffix('.log')} says more; the same command goes on."
                )
            done = sum(each.is_done for each in jobs)
            self.say(f"done   {path}, {done} of {len(jobs)} runs")

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._stop()

    def _stop(self) -> None:
        for _, process in self._running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for _, process in self._running.values():
            process.wait()
        self._running.clear()
