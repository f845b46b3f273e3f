"""Examples to rows to batches: the `Pipeline` of a task, and tasks mixed.

A row holds one example, padded, or several of one task, packed: decided once per run, by a shuffle
and first fit among a few open rows. Each epoch shuffles the rows, so row g of a task is a function
of (seed, g). A task's rate is its share of the examples (or tokens), but the schedule counts rows,
so its share of the rows is that rate divided by the examples (tokens) of one of its rows.

Letters: K tasks, N examples, R rows of an epoch.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from switchworks.batch import Batch
from switchworks.config import ConfigError, DataError
from switchworks.data.config import DataConfig
from switchworks.data.rows.mixture import Mixture, rates
from switchworks.data.rows.packing import pack
from switchworks.data.rows.pipeline import RunRows, epochs_in_random_order, grain, stream_seed
from switchworks.data.tasks.store import TaskStore

OPEN_ROWS = 16
"""Rows kept open while examples are packed; a new one closes the fullest."""

_PLAN, _TASK_ORDER, _TASK = 5, 6, 7  # the purpose of a random stream; mixture has 3 and 4


class RowPlan(NamedTuple):
    """Which examples are in which row: those of row r are order[starts[r] : starts[r + 1]]."""

    order: Int[np.ndarray, " N"]
    starts: Int[np.ndarray, " R+1"]


class TaskRows:
    """The rows of one task by their number. `cut` counts the examples whose (inputs, targets) are
    longer than a row; these are truncated, as in T5."""

    def __init__(self, config: DataConfig, store: TaskStore, eos_id: int, *, seed: int) -> None:
        self.config, self.store, self.eos_id = config, store, eos_id
        row = np.array([config.input_length, config.target_length])
        if row.min() < 2:
            raise ConfigError(
                f"data.input_length = {row[0]} and data.target_length = {row[1]}: a task needs "
                "2 positions at least of each, one of them for EOS.\n  Raise the shorter one."
            )
        lengths = store.lengths() + 1
        self.cut = tuple(int(number) for number in (lengths > row).sum(axis=0))
        self.lengths = np.minimum(lengths, row)
        self.seed = seed

    @cached_property
    def plan(self) -> RowPlan:
        """Which examples share a row. Takes seconds for a million examples."""
        shuffled = np.random.default_rng([self.seed, _PLAN]).permutation(len(self.store))
        if self.config.packs_tasks:
            return plan_rows(shuffled, self.lengths[shuffled], self.config)
        return RowPlan(shuffled, np.arange(len(self.store) + 1))

    @property
    def windows(self) -> int:
        """How many rows an epoch has."""
        return len(self.plan.starts) - 1

    @cached_property
    def _order(self) -> "grain.MapDataset[int]":
        return epochs_in_random_order(self.windows, stream_seed(self.seed, _TASK_ORDER))

    def examples_of(self, row: int) -> Int[np.ndarray, " examples"]:
        """The indices of the examples in row `row` of the run."""
        index = self._order[row]
        start, stop = self.plan.starts[index : index + 2]  # type: ignore[operator]
        return self.plan.order[start:stop]

    def rows(self, rows: Sequence[int]) -> Batch:
        """The rows with these numbers."""
        lengths = self.config.input_length, self.config.target_length
        pieces = [[self._example(int(index)) for index in self.examples_of(row)] for row in rows]
        return pack(pieces, *lengths, segments=self.config.packs_tasks)

    def _example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        inputs, target = self.store.example(index)
        return (
            with_eos(inputs, self.config.input_length, self.eos_id),
            with_eos(target, self.config.target_length, self.eos_id),
        )


def with_eos(
    tokens: Int[np.ndarray, " n"], length: int, eos_id: int
) -> Int[np.ndarray, " at_most_length"]:
    """`tokens` and EOS in at most `length` positions; longer ones are truncated."""
    return np.append(tokens[: length - 1], eos_id).astype(np.int64)


def plan_rows(
    order: Int[np.ndarray, " N"], lengths: Int[np.ndarray, "N 2"], config: DataConfig
) -> RowPlan:
    """The examples `order`, of these lengths, packed into rows.

    Each goes to the first open row with room for its inputs and its target. When there are
    OPEN_ROWS already, a new row closes the fullest, by its fuller side: first fit over all rows
    would take quadratic time.
    """
    row_of = np.empty(len(order), np.int64)
    room: dict[int, tuple[int, int]] = {}  # free positions of the open rows, oldest first
    rows, limits = 0, (config.input_length, config.target_length)
    for index, (inputs, target) in enumerate(lengths.tolist()):
        fits = (row for row, left in room.items() if inputs <= left[0] and target <= left[1])
        row = next(fits, rows)
        if row == rows:
            if len(room) == OPEN_ROWS:
                free = {row: min(np.divide(left, limits)) for row, left in room.items()}
                del room[min(free, key=free.__getitem__)]
            room[row] = limits
            rows += 1
        left = room[row]
        room[row] = left[0] - inputs, left[1] - target
        row_of[index] = row
    starts = np.cumsum([0, *np.bincount(row_of, minlength=rows)])
    return RowPlan(order[row_of.argsort(kind="stable")], starts)


def task_rates(config: DataConfig, rows: Sequence[TaskRows]) -> Float[np.ndarray, " K"]:
    """The share of the examples, or of the tokens, of each task; the sum is 1.

    In proportion to min(size, cap) ** (1 / temperature), T5's rule. The cap is in examples.
    """
    cap = np.inf if config.task_cap is None else config.task_cap
    sizes = [min(len(part.store), cap) for part in rows]
    if config.task_rates == "equal":
        return rates(sizes, 0.0)
    if config.task_rates == "tokens":  # with their EOS
        tokens_each = [float(part.lengths.sum()) / len(part.store) for part in rows]
        sizes = [size * tokens for size, tokens in zip(sizes, tokens_each, strict=True)]
    return rates(sizes, 1 / config.task_temperature)


def row_rates(
    config: DataConfig, shares: Float[np.ndarray, " K"], rows: Sequence[TaskRows]
) -> Float[np.ndarray, " K"]:
    """The share of the rows of each task that yields its share of the examples, or tokens."""
    by_tokens = config.task_rates == "tokens"
    sizes = [float(part.lengths.sum()) if by_tokens else len(part.store) for part in rows]
    weights = shares / (np.array(sizes) / np.array([part.windows for part in rows]))
    return weights / weights.sum()


def rows_of_tasks(
    config: DataConfig, stores: Mapping[str, TaskStore], eos_id: int, *, seed: int
) -> dict[str, TaskRows]:
    """The rows of each task. A task's order depends on its name, not on its index."""
    return {
        name: TaskRows(config, store, eos_id, seed=stream_seed(seed, _TASK, *name.encode()))
        for name, store in stores.items()
    }


def task_mixture(
    config: DataConfig, stores: Mapping[str, TaskStore], eos_id: int, run: RunRows
) -> Mixture:
    """One task or several, mixed by their rates."""
    if not stores:
        raise DataError("None of the tasks has a training split.\n  Name one with it.")
    parts = rows_of_tasks(config, stores, eos_id, seed=run.seed)
    rows = list(parts.values())
    return Mixture(parts, row_rates(config, task_rates(config, rows), rows), run, config.prefetch)
