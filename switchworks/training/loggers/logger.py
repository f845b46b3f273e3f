"""The protocol of a logger, and the table of those that `--log` names."""

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from switchworks.config import ConfigError
from switchworks.training.experiment import Experiment


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
    """Step -> metrics that an earlier session logged after `step`. The resumed run logs them again:
    a logger that cannot delete skips them (`new_numbers`)."""

    def new_numbers(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Those of `values` that are single numbers and that no earlier session logged."""
        known = self.logged.get(step, frozenset())
        return {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and name not in known
        }


class Logger(Protocol):
    """Receives the metrics of a run. Only the main rank has loggers."""

    def start(self, run: RunInfo) -> None:
        """Called once, before the first step of a session."""
        ...

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """`values` were measured after `step` steps: numbers, and lists of numbers.

        May be called several times per step; steps never decrease.
        """
        ...

    def close(self) -> None:
        """Called once, when the session ends, also by an error."""
        ...


_HERE = "switchworks.training.loggers"
LOGGERS: dict[str, str] = {
    "tensorboard": f"{_HERE}.tensorboard:TensorBoard",
    "trackio": f"{_HERE}.trackio:Trackio",
    "wandb": f"{_HERE}.wandb:WandB",
    "mlflow": f"{_HERE}.mlflow:MLflow",
}
"""Name in `--log` -> module:class, imported when named."""


def make_loggers(names: Sequence[str]) -> list[Logger]:
    """The loggers called `names`, not started. Raises ConfigError if one cannot be imported."""
    return [_make(name) for name in names if name.lower() != "none"]


def _make(name: str) -> Logger:
    module, _, attribute = LOGGERS.get(name, name).partition(":")
    if not attribute:
        raise ConfigError(
            f"log: there is no logger {name!r}. Loggers: {', '.join(LOGGERS)}.\n"
            "  Your own: module:class with the methods start, log and close."
        )
    if (here := str(Path.cwd())) not in sys.path:  # as `python` does, and installed commands do not
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"log: the logger {name!r} cannot be imported: {error}.") from error


def require_package(name: str) -> ModuleType:
    """The module `name`. Raises ConfigError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"--log {name} needs the package {name}, which cannot be imported: {error}.\n"
            f"  Install it: pip install {name}"
        ) from error
