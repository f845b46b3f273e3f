"""One writer of a directory at a time."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from switchworks.config import ConfigError
from switchworks.locks import holder_of, only_writer
from switchworks.training import train


@contextmanager
def holder(directory: Path) -> Iterator[subprocess.Popen]:
    """A process that has the lock of `directory`; killed at the end."""
    code = (
        "import time; from pathlib import Path\n"
        "from switchworks.locks import only_writer\n"
        f"with only_writer(Path({str(directory)!r})): print('has it', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "has it\n"
        yield process
        process.send_signal(signal.SIGKILL)


def test_the_second_is_refused_with_the_name_of_the_first_and_let_in_after_its_death(tmp_path):
    place = tmp_path / "run"
    with holder(place) as process:
        told = rf"is being written by process {process.pid} on \S+, since"
        with pytest.raises(ConfigError, match=told), only_writer(place):
            pass
    with only_writer(place):
        assert str(os.getpid()) in (tmp_path / ".run.lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_beside_the_directory_whatever_happens_inside(tmp_path):
    with pytest.raises(KeyError), only_writer(tmp_path / "run"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


MANY = """
import os, sys
from pathlib import Path
from switchworks.config import ConfigError
from switchworks.locks import only_writer
place, inside = Path(sys.argv[1]) / "run", Path(sys.argv[1]) / "inside"
for _ in range(300):
    try:
        with only_writer(place):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails if another one is inside
            inside.unlink()
    except ConfigError:
        pass
"""


def test_of_many_at_once_there_is_never_more_than_one_inside(tmp_path):
    command = [sys.executable, "-c", MANY, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]


def test_where_no_file_can_be_made_nothing_is_locked_and_the_writer_says_why(tmp_path):
    (tmp_path / "file").write_text("")
    with only_writer(tmp_path / "file" / "run"):
        pass


def test_a_second_run_in_a_run_directory_is_refused_before_it_writes(tiny_experiment, tmp_path):
    experiment = replace(tiny_experiment, steps=2, validate_every=0, sample_every=0)
    with holder(tmp_path / "run"):
        with pytest.raises(ConfigError, match="is being written by process"):
            train(experiment, tmp_path / "run")
        assert not (tmp_path / "run").exists()
    train(experiment, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not list((tmp_path / "run").rglob("*.lock"))


def test_the_root_of_all_folders_is_no_place_to_write(tmp_path):
    with pytest.raises(ConfigError, match=r"^/ is the root .*\n  Name one inside"):
        holder_of(Path("/"))
