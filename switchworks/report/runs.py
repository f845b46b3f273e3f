"""Reading run directories, and the figures that follow from them.

Of a step noted twice, by a run that was resumed, the later line wins; a line that cannot be read is
skipped and counted, and the page says so.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from switchworks.config import DataError, flatten, from_dict, read_toml
from switchworks.disk import read_json
from switchworks.evaluate import CLASSES, Classification


class Sample(NamedTuple):
    """One held-out text after `step` steps, with holes `<extra_id_0>`, ...; from a decoder-only
    model a prompt, and the original and written continuations of it."""

    step: int
    inputs: str
    truth: str
    prediction: str
    holes: tuple[dict[str, Any], ...] = ()
    """Of each hole in turn: number, nats and tokens of the true text as the model reads it, and
    what two baselines put there, unigram and copy. Empty in samples of older versions."""


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
    classes: tuple[Classification, ...] = ()
    """classes.json: the answers to its tasks that are classifications."""
    rows: tuple[dict[str, Any], ...] = ()
    samples: tuple[Sample, ...] = ()
    notes: tuple[str, ...] = ()
    """What could not be read, in sentences."""

    def series(
        self, key: str, against: str = "step"
    ) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
        """The finite values of `against` and of `key` on the lines that hold both."""
        points = [(row.get(against), row.get(key)) for row in self.rows]
        numbers = [pair for pair in points if all(isinstance(v, int | float) for v in pair)]
        pairs = np.array(numbers, dtype=float).reshape(-1, 2)
        return tuple(pairs[np.isfinite(pairs).all(axis=1)].T)

    def loads(self) -> dict[str, tuple[Float[np.ndarray, " N"], Float[np.ndarray, "N E"]]]:
        """Per switch layer: steps, and each expert's share of the tokens times E (1 = even)."""
        layers = {}
        for key in self.keys("load/"):
            lines = [(row["step"], row[key]) for row in self.rows if key in row]
            shares = np.array([shares for _, shares in lines], dtype=float)
            steps = np.array([step for step, _ in lines], dtype=float)
            layers[key.removeprefix("load/")] = steps, np.nan_to_num(shares) * shares.shape[1]
        return layers

    def last(self, key: str) -> float | None:
        """The last finite value of `key`; None if there is none."""
        return self._figure(key, lambda values: values[-1])

    def settled(self, key: str) -> float | None:
        """The mean of `key` over the last tenth of its lines, at least one; None without any."""
        return self._figure(key, lambda values: last_part(values).mean())

    def median(self, key: str) -> float | None:
        """The median of `key` over the run; None without a value."""
        return self._figure(key, np.median)

    def _figure(self, key: str, figure: Callable[[np.ndarray], Any]) -> float | None:
        values = self.series(key)[1]
        return float(figure(values)) if len(values) else None

    @property
    def sparse(self) -> bool:
        """Whether the run has switch layers: whether it noted anything about routing."""
        return any(
            key in ("train/balance", "train/experts_in_use") or key.startswith("load/")
            for key in self.keys()
        )

    def keys(self, prefix: str = "") -> dict[str, None]:
        """The keys of the lines that start with `prefix`, in the order they first occur in."""
        return {key: None for row in self.rows for key in row if key.startswith(prefix)}


def last_part(values: Float[np.ndarray, "N *rest"]) -> Float[np.ndarray, "M *rest"]:
    """The last tenth of `values`, at least one, of which figures "at the end" are means."""
    return values[-max(1, round(len(values) * 0.1)) :]


def read_run(path: Path) -> Run:
    """The run in the directory `path`. Raises DataError if that holds no metrics.jsonl."""
    if not (path / "metrics.jsonl").is_file():
        reason = "has no metrics.jsonl" if path.is_dir() else "is no directory"
        raise DataError(
            f"{path} is not a run directory: it {reason}.\n"
            "  A run directory holds metrics.jsonl, experiment.toml, about.json, samples.jsonl;\n"
            "  `switchworks train RECIPE --run-dir D` makes one."
        )
    notes: list[str] = []
    classes = _mapping(path / CLASSES, read_json, notes)
    return Run(
        path=path,
        name=path.resolve().name,
        settings=flatten(_mapping(path / "experiment.toml", read_toml, notes)),
        about=_mapping(path / "about.json", read_json, notes),
        best=_mapping(path / "best.json", read_json, notes),
        classes=tuple(
            from_dict(Classification, each, where=f"{CLASSES}: ")
            for each in classes.get("tasks", ())
        ),
        rows=_rows(path / "metrics.jsonl", notes),
        samples=_samples(path / "samples.jsonl", notes),
        notes=tuple(notes),
    )


_OBJECTIVE = ("data.objective", "data.noise_density", "data.mean_span")


def difference(run: Run, other: Run) -> str:
    """Why the losses of two runs mean different things, as what `run` has and `other` has not; ""
    if they can be compared, or if older runs do not say what they read."""
    for words, reads in _READS.items():
        here, there = reads(run), reads(other)
        if here and there and here != there:
            return f"{words} {here}, not {there}"
    digests = [each.about.get("text_digest") for each in (run, other)]
    if not all(digests) or digests[0] == digests[1]:
        return ""
    here, there = (str(each.about.get("text") or "another text") for each in (run, other))
    if here == there:
        return f"{here} with other contents or another tokenizer"
    return f"the text {here}, not {there}"


def _objective(run: Run) -> str:
    values = [run.settings[key] for key in _OBJECTIVE if key in run.settings]
    return " ".join(map(str, values))


def _tasks(run: Run) -> str:
    """Their names without the files, which the digest of the text knows."""
    entries = run.settings.get("data.tasks") or ()
    return ", ".join(str(entry).partition("=")[0] for entry in entries)


_READS: dict[str, Callable[[Run], Any]] = {
    "a tokenizer with a vocabulary of": lambda run: run.about.get("vocabulary"),
    "the tasks": _tasks,
    "text for the objective": _objective,
}


def comparable(runs: Sequence[Run]) -> list[list[Run]]:
    """`runs` in groups whose losses can be compared, in their order."""
    groups: list[list[Run]] = []
    for run in runs:
        group = next((group for group in groups if not difference(run, group[0])), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    return groups


class Reached(NamedTuple):
    """When a run's validation loss first came down to a target."""

    step: float
    seconds: float | None


def when_reached(run: Run, loss: float, key: str = "val/loss") -> Reached | None:
    """When `run`'s validation loss, `key`, first was `loss` or less, interpolated linearly between
    two validations; None if it never was."""
    step = crossing(*run.series(key), loss)
    return None if step is None else Reached(step, crossing(*run.series(key, "seconds"), loss))


def baseline(runs: Sequence[Run]) -> Run:
    """The run the others are measured against: the first dense one, else the first."""
    return next((run for run in runs if not run.sparse), runs[0])


def crossing(x: np.ndarray, losses: np.ndarray, target: float) -> float | None:
    """The x at which `losses`, interpolated linearly, first is `target` or less; None if never."""
    below = np.flatnonzero(losses <= target)
    if not len(below):
        return None
    around = slice(max(0, below[0] - 1), below[0] + 1)
    return float(np.interp(target, losses[around][::-1], x[around][::-1]))


def _rows(path: Path, notes: list[str]) -> tuple[dict[str, Any], ...]:
    rows: dict[int, dict[str, Any]] = {}
    for line in _lines(path, notes):
        step = line["step"]
        while rows and step < next(reversed(rows)):
            rows.popitem()  # resumed from a checkpoint: what came after it was done again
        rows[step] = rows.get(step, {}) | line  # training and validation lines share a step
    return tuple(rows.values())


def _samples(path: Path, notes: list[str]) -> tuple[Sample, ...]:
    samples = {}
    for line in _lines(path, notes) if path.exists() else ():
        texts = [str(line.get(key, "")) for key in ("inputs", "truth", "prediction")]
        holes = tuple(line.get("holes", ()))
        samples[line["step"], texts[0]] = Sample(line["step"], *texts, holes=holes)
    return tuple(sorted(samples.values(), key=lambda sample: -sample.step))


def _lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of `path` that are JSON objects with a step; the others are counted in `notes`."""
    skipped = 0
    if not path.is_file():  # to open a pipe is to wait for its writer
        raise DataError(f"{path} is no ordinary file.\n  Move it elsewhere.")
    content = path.read_text(encoding="utf-8", errors="replace")
    for text in filter(str.strip, content.split("\n")):  # not splitlines: text may hold U+2028
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line
        else:
            skipped += 1
    if skipped:
        lines = "1 line was" if skipped == 1 else f"{skipped} lines were"
        notes.append(f"{path.name}: {lines} unreadable and left out.")


def _mapping(
    path: Path, read: Callable[[Path], dict[str, Any]], notes: list[str]
) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return read(path)
    except ValueError as error:  # torn, or no UTF-8
        notes.append(f"{path.name} could not be read: {error}")
        return {}
