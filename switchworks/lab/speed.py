"""Tokens per second of the arms of a study, in turns, so that a busy moment meets all of them."""

import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from switchworks import checkpoint
from switchworks.batch import Batch
from switchworks.data import open_dataset
from switchworks.training import TrainState, build_state, keep_freed_memory, settings_in, train_step

ROUNDS, STEPS = 7, 10


def tokens_per_second(runs: Mapping[str, Path]) -> dict[str, float]:
    """The median over ROUNDS of each arm's rate in STEPS steps that go on from its finished run,
    with the threads that torch has: its weights, so its routing, and its text. The first round, in
    which memory is taken, does not count."""
    keep_freed_memory()
    sides = {name: _open(run) for name, run in runs.items()}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS + 1):
        for name, (state, batches) in sides.items():
            rates[name].append(_rate(state, batches))
    return {name: statistics.median(measured[1:]) for name, measured in rates.items()}


def _open(run: Path) -> tuple[TrainState, list[Batch]]:
    experiment = settings_in(run)
    assert experiment is not None  # the run is finished
    model, _ = checkpoint.load(run)
    dataset = open_dataset(experiment.data, vocab_size=experiment.model.vocab_size)
    rows = dataset.training(batch_size=experiment.batch_size, seed=experiment.seed)
    return build_state(experiment, model), [rows.batch(number) for number in range(STEPS)]


def _rate(state: TrainState, batches: Iterable[Batch]) -> float:
    started = time.perf_counter()
    tokens = sum(train_step(state, batch).tokens for batch in batches)
    return tokens / (time.perf_counter() - started)
