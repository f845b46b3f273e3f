"""Where a run's numbers go: `metrics.jsonl`, `samples.jsonl` and TensorBoard."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from switchworks.training.state import TrainState


class Recorder:
    """Appends to the files of a run directory; every line is whole once written.

    Without a directory, as on all ranks but the first, it writes nothing.
    """

    def __init__(self, run_dir: Path | None, first_step: int) -> None:
        self.board = None
        self.names: set[str] = set()
        """Of all metrics of this sitting."""
        self._now: tuple[int, dict[str, Any]] = (-1, {})
        if run_dir is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.metrics = run_dir / "metrics.jsonl"
        self.samples = run_dir / "samples.jsonl"
        for path in (self.metrics, self.samples):
            _drop_after(path, first_step)
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)

    def write(self, state: TrainState, values: Mapping[str, Any]) -> None:
        """One line of metrics, led by step, tokens and seconds; numbers also to TensorBoard."""
        self.names |= values.keys()
        self._now = (state.step, self.at(state.step) | dict(values))
        if self.board is None:
            return
        line = {"step": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 3)}
        _append(self.metrics, line | dict(values))
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(name, value, state.step)

    def at(self, step: int) -> dict[str, Any]:
        """What was said of `step`, if that was the last one anything was said of."""
        return dict(self._now[1]) if self._now[0] == step else {}

    def write_sample(self, sample: Mapping[str, Any]) -> None:
        """One fill-in."""
        if self.board is not None:
            _append(self.samples, sample)

    def close(self) -> None:
        """Flush everything."""
        if self.board is not None:
            self.board.close()


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _drop_after(path: Path, step: int) -> None:
    """Remove lines of steps after `step`, and a torn last line: a resumed run repeats them."""
    if not path.exists():
        return
    # Not splitlines: text may hold other line separators than the one that ends a line here.
    lines = path.read_bytes().split(b"\n")
    aside = path.with_suffix(".tmp")
    aside.write_bytes(b"".join(line + b"\n" for line in lines if _is_until(line, step)))
    aside.replace(path)


def _is_until(line: bytes, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False
