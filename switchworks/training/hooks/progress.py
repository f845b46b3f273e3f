"""Hooks of every run: progress lines, checkpoints, validation, and actions every so many steps."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from statistics import fmean
from typing import Any

from switchworks.checkpoint import Checkpoints
from switchworks.data import Mixture, ValidationSet
from switchworks.evaluate import measure_perplexity, validation_losses
from switchworks.progress import Phase
from switchworks.training.loggers import Recorder
from switchworks.training.state import TrainState
from switchworks.training.step import StepResult


@dataclass(eq=False)
class Every:
    """Calls `action` every `steps` steps (0: never), and after the last step unless a signal ended
    the run."""

    steps: int
    action: Callable[[TrainState], None]
    _done: int = -1

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if self.steps and state.step % self.steps == 0:
            self._act(state)

    def finish(self, state: TrainState, *, interrupted: bool) -> None:
        if self.steps and not interrupted and self._done != state.step:
            self._act(state)

    def _act(self, state: TrainState) -> None:
        self._done = state.step
        self.action(state)


class SaveCheckpoints(Every):
    """Saves all training state every `steps` steps (0: never), and always when the loop ends."""

    def __init__(self, checkpoints: Checkpoints, steps: int) -> None:
        super().__init__(steps, self._save)
        self.checkpoints = checkpoints

    def finish(self, state: TrainState, *, interrupted: bool) -> None:
        """Save the last step and return when it is on the disk."""
        if self._done != state.step:
            self._act(state)
        self.checkpoints.wait()

    def _save(self, state: TrainState) -> None:
        self.checkpoints.save(state.step, state.state_dict(), state.about())


class Progress:
    """Every `every` steps (0: never) a printed line and metrics, averaged since the last. On a
    terminal that is the line of `shown`, which changes."""

    def __init__(self, recorder: Recorder, every: int, state: TrainState, shown: Phase) -> None:
        self.recorder, self.shown = recorder, shown
        self.every = every
        self._since: list[StepResult] = []
        self._mark = (state.tokens, state.seconds)

    def after_step(self, state: TrainState, result: StepResult) -> None:
        self._since.append(result)
        self.shown.advance()
        if self.every and state.step % self.every == 0:
            self._report(state)

    def finish(self, state: TrainState, *, interrupted: bool) -> None:
        """Report the steps since the last line, also those before a signal."""
        if self._since and self.every:
            self._report(state)

    def _report(self, state: TrainState) -> None:
        done = [result for result in self._since if not result.skipped]
        values = averages(done) if done else {"train/loss": math.nan}
        if state.skipped:
            values["train/skipped"] = state.skipped
        tokens, seconds = state.tokens - self._mark[0], state.seconds - self._mark[1]
        values["tokens_per_second"] = tokens / max(seconds, 1e-9)
        per_step = seconds / len(self._since)
        values["seconds_left"] = per_step * (state.experiment.num_steps - state.step)
        self.recorder.write(state, values)
        if self.shown.is_live:
            self.shown.say(short_line(state, values))
        else:
            print(progress_line(state, values), flush=True)
        self._since, self._mark = [], (state.tokens, state.seconds)


def averages(results: Sequence[StepResult]) -> dict[str, Any]:
    """The metrics of consecutive steps: means over the steps and, where one number stands for all
    layers, over layers. Losses in nats; `balance` and `router_z` without their weights; `dropped`
    as a fraction of tokens; `load`, what tokens ask for, and `received`, what is served, as shares
    of the experts."""
    values: dict[str, Any] = {
        "train/loss": fmean(result.cross_entropy for result in results),
        "train/total": fmean(result.total for result in results),
        "train/lr": results[-1].update.lr,
        "train/grad_norm": fmean(result.update.grad_norm for result in results),
    }
    softs = [result.soft for result in results if result.soft is not None]
    if softs:
        values["train/soft"] = fmean(softs)
    layers = [layer for result in results for layer in result.layers.values()]
    if not layers:
        return values
    for field in ("balance", "router_z", "dropped", "confidence"):
        values[f"train/{field}"] = fmean(getattr(layer, field) for layer in layers)
    in_use: list[int] = []
    for name in results[0].layers:
        for kind in ("load", "received"):
            steps = zip(*(getattr(r.layers[name], kind) for r in results), strict=True)
            values[f"{kind}/{name}"] = [round(fmean(shares), 5) for shares in steps]
        in_use.append(sum(share > 0 for share in values[f"received/{name}"]))
        values[f"dropped/{name}"] = fmean(result.layers[name].dropped for result in results)
    values["train/experts_in_use"] = fmean(in_use)
    return values


def progress_line(state: TrainState, values: dict[str, Any]) -> str:
    """The printed line: loss, balance, fraction dropped, experts in use, speed, time left."""
    parts = [f"step {state.step}/{state.experiment.steps}", f"loss {values['train/loss']:.3f}"]
    if "train/soft" in values:
        parts.append(f"soft {values['train/soft']:.3f}")
    routing = state.experiment.model.routing
    if routing is not None:
        parts += [
            f"balance {values['train/balance']:.2f}",
            f"dropped {values['train/dropped']:.1%}",
            f"experts in use {values['train/experts_in_use']:.1f}/{routing.experts}",
        ]
    speed = f"{values['tokens_per_second'] / 1000:.1f}k tok/s"
    return "  ".join([*parts, speed, f"{timedelta(seconds=round(values['seconds_left']))} left"])


def short_line(state: TrainState, values: dict[str, Any]) -> str:
    """What the line of a terminal has room for beside a bar and the time left."""
    parts = [f"step {state.step}/{state.experiment.steps}", f"loss {values['train/loss']:.3f}"]
    if "train/dropped" in values:
        parts.append(f"dropped {values['train/dropped']:.1%}")
    return "  ".join([*parts, f"{values['tokens_per_second'] / 1000:.1f}k tok/s"])


def validate(
    recorder: Recorder, held_out: ValidationSet, mixture: Mixture | None, state: TrainState
) -> None:
    """Write and print the validation loss, in nats per target token, and bits per byte; of a
    mixture per corpus too, and the epochs read so far."""
    loss, per_corpus = validation_losses(state.model, held_out, state.ranks)
    epochs = {} if mixture is None else mixture.epochs(state.next_batch)
    values = {"val/loss": loss} | {f"val/loss/{name}": x for name, x in per_corpus.items()}
    for name, nats in (per_corpus or {"": loss}).items():
        values[f"val/bits_per_byte/{name}".rstrip("/")] = held_out.bits_per_byte(name, nats)
    values |= {f"epoch/{name}": times for name, times in epochs.items()}
    recorder.write(state, values)
    perplexity = measure_perplexity(loss)
    line = f"step {state.step}  validation loss {loss:.3f}  perplexity {perplexity:.1f}"
    print(line + losses_text(per_corpus) + epochs_text(epochs), flush=True)


def losses_text(losses: Mapping[str, float], most: int = 6) -> str:
    """End of a line: the losses of the corpora, or lowest and highest of more than `most`."""
    if not losses:
        return ""
    if len(losses) <= most:
        return "  " + "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    best, worst = min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)
    return (
        f"  lowest {best} {losses[best]:.3f}  highest {worst} {losses[worst]:.3f} of {len(losses)}"
    )


def epochs_text(epochs: Mapping[str, float]) -> str:
    """End of a line: which corpora were read least and most often."""
    if not epochs:
        return ""
    least, most = min(epochs, key=epochs.__getitem__), max(epochs, key=epochs.__getitem__)
    return f"  read {epochs[least]:.2g} ({least}) to {epochs[most]:.2g} times ({most})"
