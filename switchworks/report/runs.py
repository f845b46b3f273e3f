"""Reading run directories, and the figures that follow from them.

A run that was killed and resumed has some steps twice, and its last line may be torn. The later
line wins; a line that cannot be read is skipped and counted, and the page says so.
"""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from switchworks.config import DataError

LAST_PART = 0.1
"""Figures "at the end" that vary from line to line are means over this share of the steps."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One held-out text after `step` steps: holes are `<extra_id_0>`, `<extra_id_1>`, ...

    From a decoder-only model: a prompt, and the original and written continuations of it.
    """

    step: int
    inputs: str
    truth: str
    prediction: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """The contents of a run directory, with every step once and in order."""

    path: Path
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    """experiment.toml, flattened: dotted name -> value."""
    about: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    """best.json: the step whose weights became the model, and its metric. Empty: the last step."""
    rows: tuple[dict[str, Any], ...] = ()
    samples: tuple[Sample, ...] = ()
    """Newest first."""
    notes: tuple[str, ...] = ()
    """What could not be read, in sentences."""

    def series(
        self, key: str, against: str = "step"
    ) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
        """The finite values of `against` and of `key` on the lines that hold both."""
        points = [(row[against], row[key]) for row in self.rows if key in row and against in row]
        numbers = [(x, y) for x, y in points if _is_number(x) and _is_number(y)]
        pairs = np.array(numbers, dtype=float).reshape(-1, 2)
        pairs = pairs[np.isfinite(pairs).all(axis=1)]
        return pairs[:, 0], pairs[:, 1]

    def loads(self) -> dict[str, tuple[Float[np.ndarray, " N"], Float[np.ndarray, "N E"]]]:
        """Per switch layer: steps, and each expert's share of the tokens times E (1 = even)."""
        layers: dict[str, list[tuple[int, list[float]]]] = {}
        for row in self.rows:
            for key, shares in row.items():
                if key.startswith("load/") and isinstance(shares, list) and shares:
                    layers.setdefault(key.removeprefix("load/"), []).append((row["step"], shares))
        return {layer: _table(lines) for layer, lines in layers.items()}

    def last(self, key: str) -> float | None:
        """The last finite value of `key`; None if there is none."""
        values = self.series(key)[1]
        return float(values[-1]) if len(values) else None

    def settled(self, key: str) -> float | None:
        """The mean of `key` over the last tenth of its lines, at least one; None without any."""
        values = self.series(key)[1]
        return float(last_part(values).mean()) if len(values) else None

    def median(self, key: str) -> float | None:
        """The median of `key` over the run; None without a value."""
        values = self.series(key)[1]
        return float(np.median(values)) if len(values) else None

    @property
    def sparse(self) -> bool:
        """Whether the run has switch layers: whether it noted anything about routing."""
        return any(
            key.startswith("load/") or key in ("train/balance", "train/experts_in_use")
            for row in self.rows
            for key in row
        )


def last_part(values: Float[np.ndarray, "N *rest"]) -> Float[np.ndarray, "M *rest"]:
    """The last tenth of `values`, at least one."""
    return values[-max(1, round(len(values) * LAST_PART)) :]


def read_run(path: Path) -> Run:
    """The run in the directory `path`.

    Raises DataError if `path` is no run directory, that is, holds no metrics.jsonl.
    """
    if not (path / "metrics.jsonl").is_file():
        reason = "has no metrics.jsonl" if path.is_dir() else "is no directory"
        raise DataError(
            f"{path} is not a run directory: it {reason}.\n"
            "  A run directory holds metrics.jsonl, experiment.toml, about.json, samples.jsonl;\n"
            "  `switchworks train RECIPE --run-dir D` makes one."
        )
    notes: list[str] = []
    settings = flatten(_mapping(path / "experiment.toml", tomllib.loads, notes))
    return Run(
        path=path,
        name=str(settings.get("name") or path.resolve().name),
        settings=settings,
        about=_mapping(path / "about.json", json.loads, notes),
        best=_mapping(path / "best.json", json.loads, notes),
        rows=_rows(path / "metrics.jsonl", notes),
        samples=_samples(path / "samples.jsonl", notes),
        notes=tuple(notes),
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted name -> value, in the order of the file."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return flat


@dataclass(frozen=True, kw_only=True)
class Reached:
    """When a run's validation loss first came down to a target."""

    step: float
    seconds: float | None


def when_reached(run: Run, loss: float, key: str = "val/loss") -> Reached | None:
    """When `run`'s validation loss, `key`, first was `loss` or less; None if it never was.

    Interpolated linearly between the two validations on either side of `loss`.
    """
    steps, losses = run.series(key)
    step = crossing(steps, losses, loss)
    if step is None:
        return None
    return Reached(step=step, seconds=crossing(*run.series(key, "seconds"), loss))


def baseline(runs: Sequence[Run]) -> Run:
    """The run the others are measured against: the first dense one, else the first."""
    return next((run for run in runs if not run.sparse), runs[0])


def _table(lines: Sequence[tuple[int, list[float]]]) -> tuple[np.ndarray, np.ndarray]:
    experts = len(lines[0][1])
    lines = [line for line in lines if len(line[1]) == experts]
    shares = np.array([shares for _, shares in lines], dtype=float)
    return np.array([step for step, _ in lines], dtype=float), np.nan_to_num(shares) * experts


def crossing(x: np.ndarray, losses: np.ndarray, target: float) -> float | None:
    """The x at which `losses`, interpolated linearly, first is `target` or less; None if never."""
    below = np.flatnonzero(losses <= target)
    if not len(below):
        return None
    i = int(below[0])
    if i == 0:
        return float(x[0])
    share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return float(x[i - 1] + share * (x[i] - x[i - 1]))


def _rows(path: Path, notes: list[str]) -> tuple[dict[str, Any], ...]:
    rows: dict[int, dict[str, Any]] = {}
    latest = -1
    for line in _lines(path, notes):
        step = line["step"]
        if step < latest:  # resumed from a checkpoint: what came after it was done again
            rows = {known: row for known, row in rows.items() if known <= step}
        rows[step] = rows.get(step, {}) | line  # training and validation lines share a step
        latest = step
    return tuple(rows[step] for step in sorted(rows))


def _samples(path: Path, notes: list[str]) -> tuple[Sample, ...]:
    if not path.exists():
        return ()
    samples: dict[tuple[int, str], Sample] = {}
    for line in _lines(path, notes):
        texts = {key: str(line.get(key, "")) for key in ("inputs", "truth", "prediction")}
        samples[line["step"], texts["inputs"]] = Sample(step=line["step"], **texts)
    return tuple(sorted(samples.values(), key=lambda sample: -sample.step))


def _lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of `path` that are JSON objects with a step; the others are counted in `notes`."""
    skipped = 0
    content = path.read_text(encoding="utf-8", errors="replace")
    for text in content.split("\n"):  # not splitlines: text may hold U+2028
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int:
            yield line
        elif text.strip():
            skipped += 1
    if skipped:
        lines = "1 line was" if skipped == 1 else f"{skipped} lines were"
        notes.append(f"{path.name}: {lines} unreadable and left out.")


def _mapping(path: Path, parse: Any, notes: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except ValueError as error:  # torn, or not UTF-8: TOML's and JSON's errors are ValueErrors
        notes.append(f"{path.name} could not be read: {error}")
        return {}
    return values if isinstance(values, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
