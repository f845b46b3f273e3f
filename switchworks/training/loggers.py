"""Where the metrics of a run go: the protocol of a logger, the table of those that `--log` names,
and the two that write files in the run directory."""

import importlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from switchworks.config import ConfigError, import_named
from switchworks.disk import whole_file
from switchworks.training.experiment import Experiment
from switchworks.training.state import TrainState
from switchworks.trust import require_trusted

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


class RunInfo(NamedTuple):
    """What a logger is told when a session of a run starts."""

    directory: Path
    experiment: Experiment
    step: int
    """Steps done before this session: 0 in a new run."""
    info: Mapping[str, Any]
    """Contents of about.json: parameters, machine, versions, command; and `id`, which a resumed run
    keeps."""
    logged: Mapping[int, frozenset[str]] = {}
    """Step -> metrics that an earlier session logged from `step` on. All but those of `step` are
    logged again: a logger that cannot delete skips them (`new_numbers`)."""

    def new_numbers(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Those of `values` that are single numbers and that no earlier session logged."""
        known = self.logged.get(step, frozenset())
        numbers = {name: x for name, x in values.items() if isinstance(x, int | float)}
        return {name: float(x) for name, x in numbers.items() if name not in known}


class Logger(Protocol):
    """Receives the metrics of a run. Only the main rank has loggers."""

    def start(self, run: RunInfo) -> None:
        """Called once, before the first step of a session."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """`values` were measured after `step` steps: numbers, and lists of numbers. May be called
        several times per step; steps never decrease."""

    def close(self) -> None:
        """Called once, when the session ends, also by an error."""


_HERE = "switchworks.training"
LOGGERS: dict[str, str] = {
    "tensorboard": f"{_HERE}.loggers:TensorBoard",
    "trackio": f"{_HERE}.dashboards:trackio",
    "wandb": f"{_HERE}.dashboards:WandB",
    "mlflow": f"{_HERE}.dashboards:MLflow",
}
"""Name in `--log` -> module:class, imported when named."""


def make_loggers(names: Sequence[str]) -> list[Logger]:
    """The loggers called `names`, not started. Raises ConfigError if one cannot be imported."""
    return [_make(name) for name in names if name.lower() != "none"]


def _make(name: str) -> Logger:
    place = LOGGERS.get(name, name)
    if ":" not in place:
        raise ConfigError(
            f"log: there is no logger {name!r}. Loggers: {', '.join(LOGGERS)}.\n"
            "  Your own: module:class with the methods start, log and close."
        )
    require_trusted(name if name not in LOGGERS else "")
    return import_named(place, "log: the logger")()


def require_package(name: str) -> ModuleType:
    """The module `name`. Raises ConfigError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"--log {name} needs the package {name}, which cannot be imported: {error}.\n"
            f"  Install it: pip install {name}"
        ) from error


class Recorder:
    """Sends metrics to `loggers`, of which ranks other than the main one have none, and keeps those
    of the current step for hooks."""

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self.loggers = loggers
        self.names: set[str] = set()
        """All metrics of this session."""
        self._step = -1
        self._values: dict[str, Any] = {}

    def write(self, state: TrainState, values: Mapping[str, Any]) -> None:
        """Log `values` for the current step, with the tokens and seconds so far."""
        self.names |= values.keys()
        self._values = self.at(state.step) | dict(values)
        self._step = state.step
        counters = {"tokens": state.tokens, "seconds": round(state.seconds, 3)}
        for logger in self.loggers:
            logger.log(state.step, counters | dict(values))

    def at(self, step: int) -> dict[str, Any]:
        """All metrics of `step`, if it is the last step of which any were written."""
        return dict(self._values) if self._step == step else {}

    def close(self) -> None:
        """Close every logger."""
        for logger in self.loggers:
            logger.close()


class TensorBoard:
    """Writes every number as a scalar to an event file in tensorboard/, by the program's own
    records: its writer does it in a thread, which outlives an error and loses it."""

    def start(self, run: RunInfo) -> None:
        """TensorBoard hides what an earlier session logged after the step it is resumed from."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = run.directory / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter((folder / name).open("wb", buffering=0))
        step = run.step + 1
        self._add(Event(step=step, file_version="brain.Event:2"))
        self._add(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[attr-defined]
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

        scalars = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
            if isinstance(value, int | float)
        ]
        self._add(Event(step=step, summary=Summary(value=scalars)))

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())

    def close(self) -> None:
        self._writer.close()


class JsonLines:
    """Appends to metrics.jsonl, from which the report is made. A line is complete once written."""

    def start(self, run: RunInfo) -> None:
        """Lines after the step that the run is resumed from go, since it writes them again. What
        follows the last step is measured again too if it was not complete, and not logged again."""
        self.path = run.directory / METRICS
        self._known = {run.step: run.logged.get(run.step, frozenset[str]())}
        for name in (METRICS, SAMPLES):
            drop_after(run.directory / name, run.step)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if values.keys() - self._known.get(step, frozenset()):
            append_line(self.path, {"step": step, **values})

    def close(self) -> None:
        """Nothing is buffered."""


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Add `values` as one line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values, ensure_ascii=False) + "\n")


def metrics_from(path: Path, step: int) -> dict[int, frozenset[str]]:
    """Step -> names of the metrics that the metrics.jsonl in `path` has from `step` on."""
    names: dict[int, frozenset[str]] = {}
    for _, values in _lines(path / METRICS):
        if values["step"] >= step:
            names[values["step"]] = names.get(values["step"], frozenset()) | values.keys()
    return names


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line and its values. An incomplete last line is left out."""
    if not path.exists():
        return
    # Not splitlines: text may contain other line separators than the one that ends a line here.
    for line in path.read_bytes().split(b"\n"):
        try:
            values = json.loads(line)
            int(values["step"])
        except (ValueError, KeyError, TypeError):
            continue
        yield line, values


def drop_after(path: Path, step: int) -> None:
    """Delete the lines of `path`, if there is such a file, that are of later steps than `step`."""
    if path.exists():
        kept = [line for line, values in _lines(path) if values["step"] <= step]
        with whole_file(path) as aside:
            aside.write_bytes(b"".join(line + b"\n" for line in kept))
