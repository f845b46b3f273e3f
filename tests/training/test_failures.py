"""Ranks that are killed, that hang, that are told to stop or are told nonsense, under torchrun.

SWITCHWORKS_DRILL_KILLS is how many workers the drill kills, 20 by default; SWITCHWORKS_PATIENCE how
many times longer things may take here than on a quiet machine.
"""

import json
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.ranks import torchrun

import switchworks
from switchworks.checkpoint.files import verify

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("SWITCHWORKS_DRILL_KILLS", "20"))
EVERY = 3
SLOWER = int(os.environ.get("SWITCHWORKS_PATIENCE", "1"))
PATIENCE = 120 * SLOWER
"""Seconds for any one thing to happen; it should take less than ten."""
SETTINGS = (
    f"--checkpoint-every {EVERY} --keep-checkpoints 0 --log-every 1 --validate-every 1000 "
    "--validation-batches 1 --sample-every 0 --optim.schedule constant --optim.lr 0.01"
).split()


class Launch:
    """torchrun and its workers. What they say is collected in `lines`."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as said:
            self.lines.extend(line.rstrip() for line in said)

    @property
    def said(self) -> str:
        return "\n".join(self.lines)

    def until(self, happened: Callable[[], bool], what: str) -> None:
        """Returns as soon as it has."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert self.process.poll() is None, f"ended before {what}:\n{self.said}"
            assert time.monotonic() < deadline, f"{what} never came:\n{self.said}"
            time.sleep(0.001)

    def workers(self, attempt: int = 0) -> dict[int, int]:
        """Rank -> process number of those that live, of the group's nth start."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((process / "stat").read_text().rpartition(") ")[2].split()[1])
                words = (process / "environ").read_text().split("\0") if self._is(parent) else []
            except OSError:  # gone in the meantime
                continue
            told = dict(word.split("=", 1) for word in words if "=" in word)
            if told.get("TORCHELASTIC_RESTART_COUNT") == str(attempt):
                found[int(told["RANK"])] = int(process.name)
        return found

    def _is(self, parent: int) -> bool:
        return parent == self.process.pid

    def steps_since(self, line: int) -> int:
        """Steps reported after that many lines."""
        return sum(text.startswith("step ") for text in self.lines[line:])

    def end(self) -> int:
        """The status, once all is over."""
        status = self.process.wait(PATIENCE + 6 * KILLS)
        self._reader.join()
        return status

    def stop(self) -> None:
        """Leave nothing running, whatever happened."""
        for attempt in range(KILLS + 2) if self.process.poll() is None else ():
            for number in self.workers(attempt).values():
                os.kill(number, signal.SIGKILL)
        self.process.kill()
        self._reader.join(10)


@pytest.fixture
def launched():
    """Starts a torchrun that is gone when the test is."""
    started: list[Launch] = []

    def launch(command: list[str]) -> Launch:
        started.append(Launch(command))
        return started[-1]

    yield launch
    for one in started:
        one.stop()


@pytest.fixture(scope="module")
def steps() -> int:
    return 12 + 6 * KILLS


@pytest.fixture(scope="module")
def undisturbed(corpus, steps, tmp_path_factory) -> Path:
    """The run directory of the same run on the same two ranks that nobody touched."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    launch = Launch(torchrun(run_dir, corpus, "--steps", str(steps), *SETTINGS))
    assert launch.end() == 0, launch.said
    return run_dir


def last_line(run_dir: Path) -> dict:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    return {k: v for k, v in lines[-1].items() if k in ("step", "val/loss", "tokens")}


def require_equal(run_dir: Path, other: Path) -> None:
    """Both have the same final loss and weights, and every checkpoint is whole and the same."""
    assert last_line(run_dir) == last_line(other)
    assert "val/loss" in last_line(run_dir)
    one, two = (switchworks.load(path)[0].state_dict() for path in (run_dir, other))
    assert all(torch.equal(one[name], two[name]) for name in two)
    names = sorted(path.name for path in (other / "checkpoints").iterdir())
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == names
    for name in names:
        verify(run_dir / "checkpoints" / name)
        digests = [
            json.loads((path / "checkpoints" / name / "manifest.json").read_text())["tensors"]
            for path in (run_dir, other)
        ]
        assert digests[0] == digests[1], name


def lost_steps(lines: list[str]) -> list[int]:
    """At each restart, how many reported steps were done again."""
    lost, done = [], 0
    for line in lines:
        if found := re.match(r"step (\d+)/", line):
            done = int(found[1])
        elif found := re.match(r"resumed from step (\d+)", line):
            lost.append(done - int(found[1]))
    return lost


def test_random_kills_of_random_ranks_change_nothing(
    corpus, steps, undisturbed, launched, tmp_path
):
    """While they start, between steps, and while a checkpoint is written in the background."""
    draw, run_dir = random.Random(5), tmp_path / "run"
    moments = [("starting", "training", "saving")[kill % 3] for kill in range(KILLS)]
    draw.shuffle(moments)
    command = ["--steps", str(steps), "--async-checkpoints", *SETTINGS]
    launch = launched(
        torchrun(run_dir, corpus, *command, launch=("--max-restarts", str(KILLS + 1)))
    )
    half, caught_saving = run_dir / "checkpoints", 0
    for attempt, moment in enumerate(moments):
        line = len(launch.lines)
        launch.until(lambda n=attempt: len(launch.workers(n)) == 2, f"start {attempt}")
        if moment == "starting":
            time.sleep(draw.uniform(0, 4))
        else:
            wanted = draw.randrange(1, 6)
            launch.until(lambda n=line, w=wanted: launch.steps_since(n) >= w, f"{wanted} steps")
        if moment == "saving":
            launch.until(lambda: any(half.glob(".step_*.partial")), "a save")
            time.sleep(draw.uniform(0, 0.02))
        os.kill(launch.workers(attempt)[draw.randrange(2)], signal.SIGKILL)
        caught_saving += any(half.glob(".step_*.partial"))
    assert launch.end() == 0, launch.said
    require_equal(run_dir, undisturbed)
    # The interval, and those done while the checkpoint at its end was being written.
    assert max(lost_steps(launch.lines), default=0) < 2 * EVERY
    assert caught_saving or KILLS < 6


def test_the_group_starts_again_after_a_kill_and_loses_at_most_one_interval(
    corpus, steps, undisturbed, launched, tmp_path
):
    run_dir = tmp_path / "run"
    command = torchrun(
        run_dir, corpus, "--steps", str(steps), *SETTINGS, launch=("--max-restarts", "1")
    )
    launch = launched(command)
    launch.until(lambda: launch.steps_since(0) >= EVERY + 2, "a few steps")
    os.kill(launch.workers()[1], signal.SIGKILL)
    assert launch.end() == 0, launch.said
    lost = lost_steps(launch.lines)
    assert len(lost) == 1
    assert 0 <= lost[0] <= EVERY
    require_equal(run_dir, undisturbed)


def test_a_rank_that_hangs_is_named_with_its_step_and_the_group_starts_again(
    corpus, steps, undisturbed, launched, tmp_path
):
    run_dir = tmp_path / "run"
    command = ["--steps", str(steps), "--mesh.timeout", str(10 * SLOWER), *SETTINGS]
    patience = ("--max-restarts", "2", "--shutdown-timeout", "2")
    launch = launched(torchrun(run_dir, corpus, *command, launch=patience))
    launch.until(lambda: launch.steps_since(0) >= EVERY + 2, "a few steps")
    os.kill(launch.workers()[1], signal.SIGSTOP)
    assert launch.end() == 0, launch.said
    step = int(re.findall(r"error: step (\d+) has not ended for \d+ seconds", launch.said)[0])
    assert step > EVERY
    hung = re.search(r"rank 1 does not answer: .*; last heard of in step (\d+)", launch.said)
    assert hung, launch.said
    assert int(hung[1]) <= step
    assert f"waiting for others: rank 0, in step {step}" in launch.said
    require_equal(run_dir, undisturbed)


def test_sigterm_to_the_workers_saves_and_all_leave_with_status_0(corpus, launched, tmp_path):
    launch = launched(torchrun(tmp_path / "run", corpus, "--steps", "100000", *SETTINGS))
    launch.until(lambda: launch.steps_since(0) >= 2, "a few steps")
    for _ in range(2):  # the scheduler's own, and the one that torchrun passes on
        for number in launch.workers().values():
            os.kill(number, signal.SIGTERM)
    assert launch.end() == 0, launch.said
    saved = int(re.findall(r"SIGTERM: step (\d+) is saved", launch.said)[0])
    verify(tmp_path / "run" / "checkpoints" / f"step_{saved:08d}")
    assert launch.said.count("is saved in") == 1


def test_what_all_ranks_find_wrong_is_printed_once(corpus, launched, tmp_path):
    launch = launched(torchrun(tmp_path / "run", corpus, "--mesh.expert", "4"))
    assert launch.end() != 0
    errors = [line for line in launch.lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert "1 rows computed at once are not a whole number of routing groups" in errors[0]
    assert launch.said.count("Traceback") <= 1  # torchrun's own
    assert not (tmp_path / "run").exists()


def test_what_one_rank_finds_wrong_is_printed_once_and_ends_all(corpus, launched, tmp_path):
    """Only the first of a machine reads the text."""
    launch = launched(torchrun(tmp_path / "run", tmp_path / "no text"))
    assert launch.end() != 0
    errors = [line for line in launch.lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert "no text" in errors[0]
