"""An extraction by several processes ends when it is interrupted, and leaves none of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SLOW = """
import os, time
from pathlib import Path

def read(job):
    Path(f"worker-{os.getpid()}").touch()
    time.sleep(60)
    return []
"""
MAIN = """
import signal, sys
from slow import read
from switchworks.data.sources.python_docs import in_processes

signal.signal(signal.SIGINT, signal.default_int_handler)
print("begun", flush=True)
for part in in_processes(read, [["\\na"], ["\\nb"]], workers=2):
    list(part)
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_an_extraction_that_is_ended(end, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "main.py").write_text(MAIN)
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "main.py"]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.DEVNULL) as process:
        workers = begun(tmp_path)
        process.send_signal(end)
        assert process.wait(timeout=30) != 0
    deadline = time.monotonic() + 30
    while any(is_alive(worker) for worker in workers):
        assert time.monotonic() < deadline, f"{workers} live on"
        time.sleep(0.05)


def begun(folder: Path) -> list[int]:
    """The process ids of both workers, once they have begun."""
    deadline = time.monotonic() + 60
    while len(names := list(folder.glob("worker-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(path.name.removeprefix("worker-")) for path in names]


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except (FileNotFoundError, ProcessLookupError):
        return False
