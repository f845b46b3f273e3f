"""The machine: what torch computes with, and whether there is room. Takes about a second."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from switchworks.doctor.finding import Finding, judge
from switchworks.training import machine

_GIB = 2**30
LEAST_MEMORY = 2 * _GIB
"""Importing what trains takes 0.3 GiB. Weights, gradients, optimizer and activations of a model of
some ten million parameters come on top, and freed memory is kept."""
LEAST_DISK, SCARCE_DISK = _GIB // 2, 4 * _GIB
"""A run of `quickstart` writes three checkpoints of some 130 MB, a model, and tokens. Ten times as
much is what a model of 100M parameters takes."""
SLOW_BFLOAT16 = 0.5
"""Emulated, bfloat16 has a tenth of float32's speed or less, with instructions for it twice as much
or more: nothing hangs on the exact value."""


def check_machine(folder: Path) -> Iterator[Finding]:
    """Findings on this machine; `folder`, which need not exist, is where runs will be written."""
    yield _torch()
    yield _threads()
    yield _instructions()
    yield _bfloat16()
    yield _memory()
    yield _disk(folder)
    yield _compiler()
    yield _gpu()


def usable_cores() -> float:
    """The cores that this process may use: those it is bound to, within the control group's share
    of time."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    older = machine.limits("cpu/cpu.cfs_quota_us") + machine.limits("cpu/cpu.cfs_period_us")
    quota = machine.limits("cpu.max") or older
    return min(cores, quota[0] / quota[1]) if len(quota) == 2 and min(quota) > 0 else cores


def free_bytes(folder: Path) -> int:
    """Free room where `folder` is, or will be made."""
    place = folder.absolute()
    existing = next(path for path in (place, *place.parents) if path.exists())
    return shutil.disk_usage(existing).free


def _torch() -> Finding:
    libraries = {"oneDNN": torch.backends.mkldnn, "OpenMP": torch.backends.openmp}
    missing = [name for name, library in libraries.items() if not library.is_available()]
    subject = f"torch {torch.__version__} with{'out' if missing else ''} "
    subject += " and ".join(missing or libraries)
    return judge(subject, "warning", "torch-build", unless=not missing)


def _threads() -> Finding:
    threads, cores = torch.get_num_threads(), usable_cores()
    subject = f"threads: torch takes {threads}, and {cores:g} cores may be used"
    fewer = max(1, int(cores))
    if threads > fewer:
        return judge(subject, "warning", "too-many-threads", threads=fewer)
    return judge(subject, "note", "few-threads", unless=threads * 2 > fewer, threads=fewer)


def _instructions() -> Finding:
    """By the flags that the kernel lists; on ARM, where it calls them otherwise, by torch."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.exists() else set[str]()
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    capability = torch.backends.cpu.get_cpu_capability()
    subject = f"instructions: {', '.join(known) or 'no AVX2'}; torch uses {capability}"
    return judge(subject, "warning", "no-vectors", unless=capability not in ("DEFAULT", "NO AVX"))


def _bfloat16() -> Finding:
    gain = machine.bfloat16_gain()
    subject = f"bfloat16: matrix products at {gain:.2g} times the speed of float32"
    return judge(subject, "note", "slow-bfloat16", unless=gain >= SLOW_BFLOAT16)


def _memory() -> Finding:
    free = machine.available_memory()
    text = "the system does not say how much is" if free is None else f"{free / _GIB:.1f} GiB"
    enough = free is None or free >= LEAST_MEMORY
    return judge(f"memory: {text} free", "warning", "little-memory", unless=enough)


def _disk(folder: Path) -> Finding:
    free = free_bytes(folder)
    subject = f"disk: {free / _GIB:.1f} GiB free for {folder.absolute()}"
    level = "problem" if free < LEAST_DISK else "warning"
    return judge(subject, level, "little-disk", unless=free >= SCARCE_DISK)


def _compiler() -> Finding:
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    path = next(filter(None, map(shutil.which, filter(None, names))), None)
    return judge(f"compiler: {path or 'none'}", "note", "no-compiler", unless=path is not None)


def _gpu() -> Finding:
    if torch.cuda.is_available():
        device, number = torch.cuda.get_device_properties(0), torch.cuda.device_count()
        memory = device.total_memory / _GIB
        return Finding("ok", f"GPU: {number} x {device.name}, {memory:.0f} GiB")
    has_driver, built = Path("/proc/driver/nvidia/version").exists(), torch.version.cuda
    subject = f"GPU: {'a driver' if has_driver else 'none'}, torch for CUDA {built or 'not at all'}"
    return judge(subject, "warning", "unused-gpu", unless=not has_driver)
