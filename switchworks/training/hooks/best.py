"""Keeps the best weights of a run, and stops a run that gets no better.

Which step is the best so far is part of the training state, so a resumed run knows it and stops
where an uninterrupted one would. The weights lie in best/step_XXXXXXXX/ as `export` writes them,
until a better step is found and no kept checkpoint refers to them.
"""

from collections.abc import Callable
from dataclasses import InitVar, dataclass, replace
from difflib import get_close_matches
from math import isnan
from pathlib import Path

from switchworks.checkpoint import Checkpoints, copy_whole, on_rank_zero, remove_whole, steps_in
from switchworks.config import CheckpointError, ConfigError
from switchworks.disk import write_json
from switchworks.training.experiment import BestConfig
from switchworks.training.loggers import Recorder
from switchworks.training.state import Best, TrainState
from switchworks.training.step import StepResult

Export = Callable[[TrainState, Path], None]
"""Writes the state as a finished model into a directory."""


@dataclass(eq=False)
class KeepBest:
    """Compares a metric whenever a hook before it in the list has written it. Only measurements at
    their regular steps count, not those made because the run ends. Raises CheckpointError if the
    best weights so far are missing."""

    config: BestConfig
    recorder: Recorder
    checkpoints: Checkpoints
    state: InitVar[TrainState]
    export: Export

    def __post_init__(self, state: TrainState) -> None:
        self.directory = self.checkpoints.directory.with_name("best")
        if state.best is not None and not self._path(state.best.step).is_dir():
            raise CheckpointError(
                f"The best weights so far, of step {state.best.step}, are not in "
                f"{self._path(state.best.step)}.\n"
                "  Put them back, or start again in another --run-dir."
            )

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Export the weights if they are the best; count measurements that were no better."""
        value = self._measured(state)
        if value is None:
            return
        if self._is_better(value, state.best):
            state.best = Best(state.step, value)
            self.export(state, self._path(state.step))
            self._prune(state.step)
            self.recorder.write(state, {"best/step": state.step, "best/value": value})
            print(f"step {state.step}  best {self.config.metric} so far: {value:.4g}", flush=True)
        elif state.best is not None:  # None: nothing but nan so far
            state.best = replace(state.best, stale=state.best.stale + 1)
            if state.ended:
                print(
                    f"step {state.step}  stops early: {self.config.metric} was no better than "
                    f"{state.best.value:.4g} (step {state.best.step}) {state.best.stale} times in "
                    "a row"
                )

    def finish(self, state: TrainState, *, interrupted: bool) -> None:
        """Nothing: `write_model` is called when all hooks have finished."""

    def write_model(self, state: TrainState, run_dir: Path) -> None:
        """Write the best weights to model/ (and adapters/) of `run_dir`, and best.json about them.
        If the metric was never measured: those of the last step, with a warning."""
        best = state.best
        if best is None:
            self.export(state, run_dir)
            names = sorted(self.recorder.names)
            near = get_close_matches(self.config.metric, names, n=4, cutoff=0.3) or names[:4]
            print(
                f"warning: best.metric = {self.config.metric} has not been measured at a regular "
                f"step. Similar names in metrics.jsonl: {', '.join(near)}.\n"
                f"  model/ is that of the last step, {state.step}."
            )
            return
        about = {
            "metric": self.config.metric,
            "mode": self.config.direction,
            "value": best.value,
            "step": best.step,
            "last_step": state.step,
            "ended_early": state.ended,
        }

        def write() -> None:
            for part in sorted(self._path(best.step).iterdir()):
                copy_whole(part, run_dir / part.name)
            write_json(run_dir / "best.json", about)

        on_rank_zero(write)
        print(
            f"model/ is that of step {best.step}, the best by {self.config.metric} "
            f"({best.value:.4g}); the last step was {state.step}"
        )

    def _measured(self, state: TrainState) -> float | None:
        """The main rank's value, so that all ranks decide alike."""
        values = self.recorder.at(state.step)
        if self.config.metric not in values:
            return None
        value = state.ranks.all_gather(values[self.config.metric])[0]
        if type(value) not in (int, float):
            numbers = [name for name, other in values.items() if type(other) in (int, float)]
            raise ConfigError(
                f"best.metric = {self.config.metric} is not one number: {str(value)[:60]}.\n"
                f"  Numbers: {', '.join(numbers)}."
            )
        return float(value)

    def _is_better(self, value: float, best: Best | None) -> bool:
        if isnan(value) or best is None:
            return not isnan(value)
        gain = best.value - value if self.config.direction == "min" else value - best.value
        return gain > self.config.min_delta

    def _path(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}"

    def _prune(self, current: int) -> None:
        """Delete the weights that are the best neither of `current` nor of any kept checkpoint."""
        self.checkpoints.wait()  # one that is being written is kept too
        on_rank_zero(lambda: self._delete_all_but(current))

    def _delete_all_but(self, current: int) -> None:
        steps = steps_in(self.directory)
        # The best that a checkpoint knows is the newest one not after it.
        needed = [
            max((step for step in steps if step <= checkpoint), default=current)
            for checkpoint in self.checkpoints.steps()
        ]
        for step in steps.keys() - {current, *needed}:
            remove_whole(steps[step])
