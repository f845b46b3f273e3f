"""The best weights a run has passed through are kept, and a run that gets no better ends.

Which weights were the best so far is part of the training state, so a resumed run knows it and
ends where an uninterrupted one would. The weights lie in best/step_XXXXXXXX/ as `export` writes
them. Older ones stay as long as a checkpoint is kept that knows no better.
"""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from math import isnan
from pathlib import Path
from typing import Any

from switchworks.checkpoint import Checkpoints, copy_whole, on_rank_zero, write_json
from switchworks.config import CheckpointError, ConfigError
from switchworks.training.experiment import BestConfig
from switchworks.training.recorder import Recorder
from switchworks.training.state import Best, TrainState
from switchworks.training.step import StepResult

Export = Callable[[TrainState, Path], None]
"""Writes what the state would be as a finished model into a directory."""


class KeepBest:
    """A hook that looks at a metric whenever another hook before it has recorded it.

    What is measured after the last step, out of turn, may become the model too. It does not enter
    the state: a run that is made longer goes on as if it had not been.
    """

    def __init__(
        self,
        config: BestConfig,
        recorder: Recorder,
        checkpoints: Checkpoints,
        state: TrainState,
        export: Export,
    ) -> None:
        """Raises CheckpointError if the best weights so far are gone."""
        self.config = config
        self.recorder = recorder
        self.checkpoints = checkpoints
        self.directory = checkpoints.directory.with_name("best")
        self.export = export
        self.last: Best | None = None
        """The last step's, where it was measured out of turn and is the best."""
        self._done = -1
        self._noted = False
        if state.best is not None and not self._place(state.best.step).is_dir():
            raise CheckpointError(
                f"The best weights so far, of step {state.best.step}, are not in "
                f"{self._place(state.best.step)}.\n"
                "  Put them back, or begin again in another --run-dir."
            )

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Keep the weights if they are the best; count the measurements that were no better."""
        value = self._measured(state)
        if value is None:
            self._note_absence(state)
            return
        self._done = state.step
        if self._better(value, state.best):
            state.best = Best(state.step, value)
            self.export(state, self._place(state.step))
            self._prune(state.step)
            self.recorder.write(state, {"best/step": state.step, "best/value": value})
            print(f"step {state.step}  best {self.config.metric} so far: {value:.4g}", flush=True)
        else:
            assert state.best is not None or isnan(value)
            if state.best is not None:
                state.best = replace(state.best, stale=state.best.stale + 1)
        if state.ended and state.best is not None:
            print(
                f"step {state.step}  ends here: {self.config.metric} was no better than "
                f"{state.best.value:.4g} (step {state.best.step}) {state.best.stale} times in a row"
            )

    def finish(self, state: TrainState, *, interrupted: bool) -> None:
        """Look at what was measured after the last step, unless it is known already."""
        if interrupted or self._done == state.step:
            return
        value = self._measured(state)
        if value is not None and self._better(value, state.best):
            self.last = Best(state.step, value)

    def write_model(self, state: TrainState, run_dir: Path) -> None:
        """model/ (and adapters/) of `run_dir` are the best weights; best.json and a line say whose.

        Those of the last step if the metric was never measured, with a warning.
        """
        best = self.last or state.best
        if best is None or best.step == state.step:
            self.export(state, run_dir)
        else:
            on_rank_zero(lambda: self._copy(best.step, run_dir))
        if best is None:
            print(f"warning: {self._absent()}\n  model/ is that of the last step, {state.step}.")
            return
        about = {
            "metric": self.config.metric,
            "mode": self.config.direction,
            "value": best.value,
            "step": best.step,
            "last_step": state.step,
            "ended_early": state.ended,
        }
        on_rank_zero(lambda: write_json(run_dir / "best.json", about))
        print(
            f"model/ is that of step {best.step}, the best by {self.config.metric} "
            f"({best.value:.4g}); the last step was {state.step}"
        )

    def _measured(self, state: TrainState) -> float | None:
        """What the first rank has, so that all ranks keep and end alike."""
        value = self.recorder.at(state.step).get(self.config.metric)
        if value is not None:
            value = state.ranks.all_gather(value)[0]
        if value is not None and type(value) not in (int, float):
            raise ConfigError(
                f"best.metric = {self.config.metric} is not one number: {str(value)[:60]}.\n"
                f"  Numbers: {', '.join(_numbers(self.recorder.at(state.step)))}."
            )
        return None if value is None else float(value)

    def _better(self, value: float, than: Best | None) -> bool:
        if isnan(value):
            return False
        if than is None:
            return True
        gain = than.value - value if self.config.direction == "min" else value - than.value
        return gain > self.config.min_delta

    def _note_absence(self, state: TrainState) -> None:
        """Once, when the first measurements come and the metric is not among them."""
        if not self._noted and state.best is None and "val/loss" in self.recorder.at(state.step):
            self._noted = True
            print(f"note: {self._absent()}", flush=True)

    def _absent(self) -> str:
        seen = sorted(self.recorder.names)
        near = get_close_matches(self.config.metric, seen, n=4, cutoff=0.3) or seen[:4]
        return (
            f"best.metric = {self.config.metric} has not been measured. "
            f"Near it in metrics.jsonl: {', '.join(near)}."
        )

    def _place(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}"

    def _copy(self, step: int, run_dir: Path) -> None:
        for part in sorted(self._place(step).iterdir()):
            copy_whole(part, run_dir / part.name)

    def _prune(self, current: int) -> None:
        """Delete what neither `current` nor any kept checkpoint would be the best of."""
        self.checkpoints.wait()  # the one that is being written will be kept too
        on_rank_zero(lambda: self._delete_all_but(current))

    def _delete_all_but(self, current: int) -> None:
        found = re.compile(r"step_(\d{8,})")
        steps = {
            int(match[1]): path
            for path in self.directory.iterdir()
            if (match := found.fullmatch(path.name))
        }
        known = [
            max((step for step in steps if step <= checkpoint), default=current)
            for checkpoint in self.checkpoints.steps()
        ]
        for step in steps.keys() - {current, *known}:
            shutil.rmtree(steps[step], ignore_errors=True)


def _numbers(values: Mapping[str, Any]) -> list[str]:
    return [name for name, value in values.items() if type(value) in (int, float)]
