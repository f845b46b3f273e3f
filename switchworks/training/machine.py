"""What a run sets on the machine, and what it says about it."""

import ctypes
import os
import platform
import sys
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Names of glibc's malloc.h, which Python does not know."""


def keep_freed_memory() -> bool:
    """Ask glibc to keep large blocks that torch frees, and to reuse them; True if it agreed.

    By default it returns them to the system and faults them in again at every step, which costs
    10 to 40 % of a training step on CPU. Elsewhere than on glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


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
