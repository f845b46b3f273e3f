"""metrics.jsonl: one JSON object per line, read by `switchworks report`."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from switchworks.training.loggers.logger import RunInfo

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


class JsonLines:
    """Appends to metrics.jsonl. Every line is complete once written."""

    def start(self, run: RunInfo) -> None:
        """Lines after the step that the run is resumed from go, since it writes them again."""
        self.path = run.directory / METRICS
        for name in (METRICS, SAMPLES):
            _drop_after(run.directory / name, run.step)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line."""
        append_line(self.path, {"step": step, **values})

    def close(self) -> None:
        """Nothing is buffered."""


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Add `values` as one line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values, ensure_ascii=False) + "\n")


def metrics_after(path: Path, step: int) -> dict[int, frozenset[str]]:
    """Step -> names of the metrics that the metrics.jsonl in `path` has after `step`."""
    names: dict[int, frozenset[str]] = {}
    for _, values in _lines(path / METRICS):
        if values["step"] > step:
            names[values["step"]] = names.get(values["step"], frozenset()) | values.keys()
    return names


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line and what it says. An incomplete last line is left out."""
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


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    aside = path.with_suffix(".tmp")
    aside.write_bytes(
        b"".join(line + b"\n" for line, values in _lines(path) if values["step"] <= step)
    )
    aside.replace(path)
