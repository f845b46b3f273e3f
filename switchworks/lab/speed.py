"""Tokens per second of the arms of a study, in turns, so that a busy moment meets all of them."""

import statistics
import time
from collections.abc import Mapping

import torch

from switchworks.batch import Batch
from switchworks.training import Experiment, TrainState, build_state, keep_freed_memory, train_step

ROUNDS, STEPS = 7, 10


def tokens_per_second(arms: Mapping[str, Experiment]) -> dict[str, float]:
    """The median over ROUNDS of each arm's rate in STEPS steps, with the threads that torch has.
    The first round, in which memory is taken, does not count."""
    keep_freed_memory()
    states = {name: build_state(experiment) for name, experiment in arms.items()}
    rates: dict[str, list[float]] = {name: [] for name in states}
    for _ in range(ROUNDS + 1):
        for name, state in states.items():
            rates[name].append(_rate(state))
    return {name: statistics.median(measured[1:]) for name, measured in rates.items()}


def _rate(state: TrainState) -> float:
    batch, started = _batch(state.experiment), time.perf_counter()
    for _ in range(STEPS):
        train_step(state, batch)
    return STEPS * batch.num_tokens / (time.perf_counter() - started)


def _batch(experiment: Experiment) -> Batch:
    rows, lengths = experiment.batch_size, experiment.data
    shapes = (rows, lengths.input_length), (rows, lengths.target_length)
    inputs, targets = (torch.randint(2, experiment.model.vocab_size, shape) for shape in shapes)
    return Batch(inputs=inputs, targets=targets)
