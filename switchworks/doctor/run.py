"""A run directory: who writes it, whether it goes on, and whether it learns. And what a path is."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float

from switchworks import checkpoint
from switchworks.data import DataConfig
from switchworks.doctor.finding import Finding, guarded, judge, listed
from switchworks.doctor.model import check_checkpoint, check_model
from switchworks.doctor.recipe import repeated
from switchworks.doctor.text import check_text
from switchworks.locks import holder_of
from switchworks.report import Run, read_run
from switchworks.training import settings_in

STALLED_SECONDS, STALLED_LINES = 600.0, 10
"""A run is stalled without a line for ten minutes, which compiling or a checkpoint of billions of
parameters may take, and for ten times as long as between its lines so far."""
RISE, NOISES = 0.1, 3
"""Nats, and multiples of the median step from line to line, by which a loss has risen: less is
within what runs of two seeds differ by, or within its noise."""
SPIKE = 10
"""The same multiple for one line above the median of those around it. A line in thousands is beyond
five of a normal distribution, hardly any beyond ten."""
LEAST_LINES = 5
"""Fewer do not tell a trend from noise."""
IDLE = 0.01
"""Of the even share of the tokens: such an expert learns a hundredth of what others do."""
MUCH_DROPPED = 0.1
"""Share of the tokens. The paper reports under 1 % once experts are balanced."""


def check_path(path: Path) -> Iterator[Finding]:
    """Findings on what `path` is, which exists: a run, a model or checkpoint of one, or text."""
    if any((path / name).exists() for name in ("experiment.toml", "metrics.jsonl")):
        yield from check_run(path)
    elif (path / "counters.json").exists():
        yield from guarded(f"checkpoint {path}", check_checkpoint, path)
    elif any((path / name).exists() for name in ("config.toml", "config.json")):
        yield from guarded(f"model {path}", check_model, path)
    else:
        yield from guarded(f"text {path}", check_text, DataConfig(path=str(path)))


def check_run(path: Path) -> Iterator[Finding]:
    """Findings on the run directory `path`, its newest checkpoint and its model."""
    holder, metrics = holder_of(path), path / "metrics.jsonl"
    if metrics.is_file() and metrics.stat().st_size:
        yield from guarded(f"run {path}", _check_metrics, path, holder)
    else:
        subject = f"run {path}: metrics.jsonl has no line, and {holder or 'nobody'} is writing"
        yield judge(subject, "note", "no-metrics")
    if steps := checkpoint.steps_in(path / "checkpoints"):
        newest = steps[max(steps)]
        yield from guarded(f"checkpoint {newest}", check_checkpoint, newest)
    if (path / "model").is_dir():
        yield from guarded(f"model {path / 'model'}", check_model, path / "model")


def _check_metrics(path: Path, holder: str | None) -> Iterator[Finding]:
    run, label = read_run(path), f"run {path}"
    for note in run.notes:
        yield judge(f"{label}: {note}", "warning", "torn-lines")
    yield from guarded(label, _state, run, holder)
    for check in (_finite_losses, _trend, _spikes, _overfits, _dropped, _epochs, _idle):
        yield from guarded(label, check, run)


def _state(run: Run, holder: str | None) -> Iterator[Finding]:
    """Whether somebody writes it, is stalled, or has left it before its end."""
    last, experiment = max((row["step"] for row in run.rows), default=0), settings_in(run.path)
    steps = math.inf if experiment is None else experiment.steps
    subject = f"run {run.path}: step {last} of {steps}, {holder or 'nobody'} is writing it"
    if holder is not None:
        yield _progress(subject, run)
    else:
        ended = last == steps or (run.path / "model").is_dir()
        yield judge(subject, "note", "unfinished", unless=ended)


def _progress(subject: str, run: Run) -> Finding:
    silent = time.time() - (run.path / "metrics.jsonl").stat().st_mtime
    seconds = np.diff(run.series("train/loss", "seconds")[0])
    usual = float(np.median(seconds)) if len(seconds) else 0.0
    subject += f"; last line {silent:.0f} s ago, {usual:.0f} s between lines"
    goes_on = silent < max(STALLED_SECONDS, STALLED_LINES * usual)
    return judge(subject, "warning", "stalled", unless=goes_on)


def _finite_losses(run: Run) -> Iterator[Finding]:
    keys = ("train/loss", "train/total", "val/loss")
    values = [(row["step"], row[key]) for row in run.rows for key in keys if key in row]
    steps = [n for n, x in values if not isinstance(x, int | float) or not math.isfinite(x)]
    subject = (
        f"run {run.path}: {f'not finite at step {listed(steps)}' if steps else 'finite'} losses"
    )
    yield judge(subject, "problem", "diverged", unless=not steps)


def _trend(run: Run) -> Iterator[Finding]:
    """Compares the end with the best tenth of the run, and with its first."""
    losses = run.series("train/loss")[1]
    if len(losses) < LEAST_LINES:
        return
    tenths = [part.mean() for part in np.array_split(losses, min(10, len(losses)))]
    first, best, end = tenths[0], min(tenths), tenths[-1]
    figures = f"{first:.3f} at the beginning, {best:.3f} at its best, {end:.3f} at the end"
    level = "problem" if end >= first else "warning"
    falls = end - best <= max(RISE, NOISES * _noise(losses))
    yield judge(f"run {run.path}: training loss {figures}", level, "diverging", unless=bool(falls))


def _noise(losses: Float[np.ndarray, " N"]) -> float:
    return float(np.median(np.abs(np.diff(losses))))


def _spikes(run: Run) -> Iterator[Finding]:
    steps, losses = run.series("train/loss")
    if len(losses) < LEAST_LINES:
        return
    around = np.median(np.lib.stride_tricks.sliding_window_view(losses, 5), axis=1)
    jumps = losses[2:-2] - around > max(RISE, SPIKE * _noise(losses))
    places = steps[2:-2][jumps].astype(int).tolist()
    subject = f"run {run.path}: the loss jumps at {listed(places) or 'no'} step"
    yield judge(subject, "warning", "spikes", unless=not places)


def _overfits(run: Run) -> Iterator[Finding]:
    losses = run.series("val/loss")[1]
    if len(losses):
        best, end = losses.min(), losses[-1]
        subject = f"run {run.path}: validation loss {end:.3f}, {best:.3f} at its best"
        yield judge(subject, "warning", "overfits", unless=bool(end - best <= RISE))


def _dropped(run: Run) -> Iterator[Finding]:
    share = run.settled("train/dropped")
    if share is not None and len(run.series("train/dropped")[0]) >= LEAST_LINES:
        subject = f"run {run.path}: {share:.1%} of the tokens are dropped at the end"
        yield judge(subject, "warning", "much-dropped", unless=share <= MUCH_DROPPED)


def _epochs(run: Run) -> Iterator[Finding]:
    """By the run's own count in a mixture; else positions read over tokens there are."""
    counts = [value for key in run.keys("epoch/") if (value := run.last(key)) is not None]
    tokens, total = run.last("tokens"), run.about.get("train_tokens")
    if not counts and tokens and isinstance(total, int) and total > 0:
        counts = [tokens / total]
    if counts and not run.settings.get("data.tasks"):
        yield repeated(f"run {run.path}: text was read about {max(counts):.1f} times", max(counts))


def _idle(run: Run) -> Iterator[Finding]:
    """Experts that routers do not ask for, by the last tenth of the lines."""
    for layer, (_, shares) in run.loads().items():
        end = shares[-max(1, len(shares) // 10) :].mean(axis=0)
        idle = np.flatnonzero(end < IDLE).tolist()
        subject = (
            f"run {run.path}, {layer}: experts {listed(idle) or 'in use, none'} of {len(end)} idle"
        )
        level = "problem" if len(idle) > len(end) / 2 else "warning"
        yield judge(subject, level, "idle-experts", unless=not idle)
