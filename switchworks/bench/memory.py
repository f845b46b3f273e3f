"""Peak memory of a workload in a process of its own (`python -m switchworks.bench.memory`)."""

import json
import resource
import subprocess
import sys
from pathlib import Path

from switchworks.bench.config import Workload
from switchworks.config import from_dict, to_dict

STEPS = 3


def peak_memory(workload: Workload, threads: int) -> float:
    """Largest resident memory, in MB (10^6 bytes), of a fresh process that builds `workload` and
    takes a few steps. Everything counts: Python, torch and, for a peer, transformers. Raises
    RuntimeError with the stderr of the process if it fails."""
    words = [sys.executable, "-m", "switchworks.bench.memory", json.dumps(to_dict(workload))]
    done = subprocess.run([*words, str(threads)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring memory failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return float(done.stdout.splitlines()[-1])


def available_bytes() -> int | None:
    """Memory that a process could still take, on Linux; None elsewhere."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable:")


def _main() -> None:
    import torch

    from switchworks.bench.workloads import build
    from switchworks.training import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(int(sys.argv[2]))
    work = build(from_dict(Workload, json.loads(sys.argv[1])))
    for _ in range(STEPS):
        work()
    print(_peak() / 1e6)


def _peak() -> int:
    """Bytes. Not ru_maxrss on Linux, where a child inherits its parent's."""
    peak = _kilobytes(Path("/proc/self/status"), "VmHWM:")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _kilobytes(file: Path, key: str) -> int | None:
    """The value of `key`, which is in kB, in bytes; None if there is no such file."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


if __name__ == "__main__":
    _main()
