"""What a run sets on the machine, and what it says about it."""

import contextlib
import ctypes
import gc
import os
import platform
import sys
import time
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from switchworks.device import compute_device

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Names of glibc's malloc.h, which Python does not know."""


def keep_freed_memory() -> bool:
    """Ask glibc to keep large blocks that torch frees, and to reuse them; True if it agreed.

    By default it returns them to the system and faults them in again at every step, which costs
    10 to 40 % of a training step on CPU. Elsewhere than on glibc nothing happens.

    -1 stands for no bound at all: with the largest int, 2 GB, the gradients of a model of 800
    million weights were still given back.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def give_back_memory() -> None:
    """What was freed goes back to the system, after `keep_freed_memory` has kept it."""
    gc.collect()
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@cache
def bfloat16_gain(size: int = 256) -> float:
    """How many times faster this machine multiplies matrices in bfloat16 than in float32.

    About 2 to 6 with AVX-512 bf16, AMX or a GPU; below 0.1 on processors that have to emulate it,
    which most laptops do. Measured once, in some hundredths of a second.
    """
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
    """bfloat16 where products in it are faster, else float32."""
    return "bfloat16" if bfloat16_gain() > 1.2 else "float32"


def describe() -> str:
    """Processor, cores and memory in a few words."""
    processor = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":", 1)[1].strip()
                break
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (OSError, ValueError):
        return processor
    flags = ""
    if torch.cpu._is_amx_tile_supported():
        flags = ", AMX"
    elif torch.cpu._is_avx512_bf16_supported():
        flags = ", AVX-512 bf16"
    return f"{processor}{flags}, {os.cpu_count()} cores, {memory:.0f} GiB"
