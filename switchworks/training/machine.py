"""The machine: memory allocator, speed of bfloat16, a description."""

import contextlib
import ctypes
import gc
import os
import platform
import re
import sys
import time
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from switchworks.device import compute_device

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""From glibc's malloc.h."""
CGROUP = Path("/sys/fs/cgroup")
"""The limits of a container: files of version 2, or in folders those of version 1."""


def keep_freed_memory() -> bool:
    """Make glibc keep and reuse large freed blocks; True if it does. Without glibc: nothing.

    By default it returns them to the system and faults them in again at every step, which costs
    10 to 40 % of a training step on CPU. A trim threshold of -1 means no limit; with the largest
    int, 2 GB, the gradients of a model of 800 million weights were still returned.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def prepare(threads: int) -> None:
    """Keep freed memory, and compute with this number of threads; 0: torch's default."""
    keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)


def give_back_memory() -> None:
    """Return freed memory to the system, also after `keep_freed_memory`."""
    gc.collect()
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@cache
def bfloat16_gain(size: int = 256) -> float:
    """Speed of bfloat16 matrix products on this machine, relative to float32. About 2 to 6 with
    AVX-512 bf16, AMX or a GPU; below 0.1 on CPUs that emulate it, as most laptops do. Measured once
    per process, in some hundredths of a second."""
    device = compute_device()
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(size, size, dtype=dtype, device=device)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            float((a @ a)[0, 0])  # waits for the device
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def fastest_precision() -> Literal["float32", "bfloat16"]:
    """bfloat16 if its products are at least 1.2 times as fast as float32's."""
    return "bfloat16" if bfloat16_gain() > 1.2 else "float32"


def available_memory() -> int | None:
    """Bytes that new processes can have, within the limit of the control group (container); None
    where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    free = int(re.findall(r"^MemAvailable: *(\d+) kB", text, re.M)[0]) * 1024
    older = limits("memory/memory.limit_in_bytes"), limits("memory/memory.usage_in_bytes")
    for limit, usage in ((limits("memory.max"), limits("memory.current")), older):
        free = min(free, max(0, limit[0] - usage[0])) if limit and usage else free
    return free


def limits(name: str) -> list[int]:
    """The numbers in a file of the control group; none if it is not there, or sets no limit."""
    try:
        text = (CGROUP / name).read_text(encoding="utf-8")
    except OSError:
        return []
    return [] if "max" in text else [int(word) for word in text.split()]


def describe() -> str:
    """CPU, cores and memory, for about.json and reports."""
    cpu = platform.processor() or platform.machine()
    try:
        if names := re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M):
            cpu = names[0].strip()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (OSError, ValueError):
        return cpu
    flags = ", AVX-512 bf16" if torch.cpu._is_avx512_bf16_supported() else ""
    flags = ", AMX" if torch.cpu._is_amx_tile_supported() else flags
    return f"{cpu}{flags}, {os.cpu_count()} cores, {memory:.0f} GiB"
