"""The whole run: limit, comparisons or sweep, limit again; table, JSON and picture."""

import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from switchworks import disk
from switchworks.bench.comparisons import comparisons
from switchworks.bench.config import BenchConfig, Precision
from switchworks.bench.measure import Row, matrix_limit, measure, share_of_limit
from switchworks.bench.peers import available
from switchworks.bench.sweep import draw_sweep, sweep
from switchworks.training import machine


def bench(
    config: BenchConfig,
    *,
    sweep_experts: bool = False,
    json_file: Path | None = None,
    picture: Path | None = None,
) -> list[Row]:
    """Measure, print a line as each row is there, and write the files.

    With `sweep_experts` only the sweep over E, which has a picture. The first row holds the
    conditions: command, versions, CPU. The JSON is written after every row, so that a run that is
    ended early leaves what it has.
    """
    machine.keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    precision: Precision = (
        machine.fastest_precision() if config.precision == "auto" else config.precision
    )
    rows = [Row(name="conditions", unit="", details=_conditions(config, precision))]
    print(f"{machine.describe()}, {torch.get_num_threads()} threads, {precision}", flush=True)
    _print_cells("", "ours", "peer", "ratio", "spread")
    for row in _rows(config, precision, sweep_experts):
        rows.append(row)
        if json_file is not None:
            write_json(rows, json_file)
    print("ratio: ours over the peer's; spread: its quartiles over the rounds")
    if picture is not None and sweep_experts:
        draw_sweep(rows[1:], picture)
    for file in filter(None, (json_file, picture)):
        print(f"wrote {file.resolve()}")
    return rows


def write_json(rows: list[Row], file: Path) -> None:
    """The rows as a list of objects: name, unit, ours, peer, ratio, spread, floor and more."""
    disk.write_json(file, [asdict(row) for row in rows])


def cells(row: Row) -> tuple[str, ...]:
    """A line of the table: name with its note, ours, peer, ratio, spread."""
    name = f"{row.name} ({row.note})" if row.note else row.name
    values = ["" if v is None else f"{_figure(v)} {row.unit}" for v in (row.ours, row.peer)]
    ratio = "" if row.ratio is None else _figure(row.ratio)
    quartiles = "" if row.spread is None else "-".join(map(_figure, row.spread))
    return name, *values, ratio, quartiles


def _rows(config: BenchConfig, precision: Precision, sweep_experts: bool) -> Iterator[Row]:
    if sweep_experts:
        yield from map(_print, sweep(config, precision))
        return
    peers = available()
    if not peers:
        print("transformers is not installed: rows against it have our side only")
    limit, done = matrix_limit(config.limit_size, precision), []
    for comparison in comparisons(config, precision, peers=peers):
        done.append((comparison, _print(measure(comparison, config))))
        yield done[-1][1]
    limit = max(limit, matrix_limit(config.limit_size, precision))
    yield _print(Row(name=f"matrix limit, {precision}", unit="TFLOP/s", ours=limit / 1e12))
    shares = [share_of_limit(comparison, row, limit) for comparison, row in done]
    yield from map(_print, filter(None, shares))


def _print(row: Row) -> Row:
    _print_cells(*cells(row))
    return row


def _print_cells(name: str, ours: str, peer: str, ratio: str, quartiles: str) -> None:
    print(f"  {name:<44} {ours:>18} {peer:>18} {ratio:>8} {quartiles:>13}", flush=True)


def _figure(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _conditions(config: BenchConfig, precision: Precision) -> dict[str, Any]:
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": asdict(replace(config, precision=precision)),
        "machine": machine.describe(),
        "cpu_flags": [torch.backends.cpu.get_cpu_capability()],
        "threads": torch.get_num_threads(),
        "allocator": "glibc, keeping freed memory, unless LD_PRELOAD names another",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("switchworks", "torch", "transformers")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
