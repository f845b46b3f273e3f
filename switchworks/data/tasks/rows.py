"""Examples to rows to batches: the `Pipeline` of a task, and tasks mixed.

A row holds one example, padded, or several of one task, packed. Which examples share a row is
settled once per run, by a shuffle and first fit among a few open rows; each epoch shuffles the
rows. So row g of a task follows from (seed, g), as everything here does: whose turn it is comes
from `mixture.MixtureSchedule`, and there is no state to save.

A task's rate is its share of the examples drawn (or of the tokens). Rows are what turns deal out,
and a row of short examples holds more of them, so a task's share of the rows is its rate divided
by what one of its rows holds. Letters: K tasks, N examples, R rows of an epoch.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from switchworks.batch import Batch
from switchworks.config import ConfigError, DataError
from switchworks.data.config import DataConfig
from switchworks.data.rows.mixture import Mixture, MixtureSchedule, rates
from switchworks.data.rows.packing import pack
from switchworks.data.rows.pipeline import check_shares, grain
from switchworks.data.tasks.store import TaskStore

OPEN_ROWS = 16
"""So many rows are kept open while examples are packed; a new one closes the fullest."""

_PLAN, _TASK_ORDER, _TASK = 5, 6, 7  # what a random stream is for; mixture has 3 and 4


class Plan(NamedTuple):
    """Which examples are in which row: those of row r are order[starts[r] : starts[r + 1]]."""

    order: Int[np.ndarray, " N"]
    starts: Int[np.ndarray, " R+1"]


class TaskRows:
    """The rows of one task by their number.

    `cut` counts the examples whose (inputs, target) are longer than a row; they lose their end,
    as in T5.
    """

    def __init__(self, config: DataConfig, store: TaskStore, eos_id: int, *, seed: int) -> None:
        self.config, self.store, self.eos_id = config, store, eos_id
        row = np.array([config.input_length, config.target_length])
        if row.min() < 2:
            raise ConfigError(
                f"data.input_length = {row[0]} and data.target_length = {row[1]}: a task needs "
                "2 positions at least of each, one of them for EOS."
            )
        lengths = store.lengths() + 1
        self.cut = tuple(int(number) for number in (lengths > row).sum(axis=0))
        self.lengths = np.minimum(lengths, row)
        self.seed = seed

    @cached_property
    def plan(self) -> Plan:
        """Which examples share a row. Takes seconds for a million examples."""
        shuffled = np.random.default_rng([self.seed, _PLAN]).permutation(len(self.store))
        if self.config.packs_tasks:
            return plan_rows(shuffled, self.lengths[shuffled], self.config)
        return Plan(shuffled, np.arange(len(self.store) + 1))

    @property
    def windows(self) -> int:
        """How many rows an epoch has."""
        return len(self.plan.starts) - 1

    @cached_property
    def _order(self) -> "grain.MapDataset":
        order_seed = int(np.random.SeedSequence([self.seed, _TASK_ORDER]).generate_state(1)[0])
        return grain.MapDataset.range(self.windows).shuffle(seed=order_seed).repeat()

    @property
    def tokens_per_example(self) -> float:
        """On average, of inputs and target, with their EOS."""
        return float(self.lengths.sum()) / len(self.store)

    @property
    def examples_per_row(self) -> float:
        """On average."""
        return len(self.store) / self.windows

    @property
    def tokens_per_row(self) -> float:
        """On average, of inputs and targets, with their EOS."""
        return float(self.lengths.sum()) / self.windows

    def examples_of(self, row: int) -> Int[np.ndarray, " examples"]:
        """The numbers of the examples in row `row` of the run."""
        place = self._order[row]
        start, stop = self.plan.starts[place : place + 2]  # type: ignore[operator]
        return self.plan.order[start:stop]

    def rows(self, rows: Sequence[int]) -> Batch:
        """The rows with these numbers."""
        made = [[self._example(int(index)) for index in self.examples_of(row)] for row in rows]
        lengths = self.config.input_length, self.config.target_length
        packed = [pack(pairs, *lengths) for pairs in made]
        assert all(len(part.inputs) == 1 for part in packed)
        parts = (torch.from_numpy(np.concatenate(part)) for part in zip(*packed, strict=True))
        inputs, targets, input_segments, target_segments = parts
        if not self.config.packs_tasks:
            return Batch(inputs=inputs, targets=targets)
        return Batch(
            inputs=inputs,
            targets=targets,
            input_segments=input_segments,
            target_segments=target_segments,
        )

    def _example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        inputs, target = self.store.example(index)
        return (
            with_eos(inputs, self.config.input_length, self.eos_id),
            with_eos(target, self.config.target_length, self.eos_id),
        )


def with_eos(
    tokens: Int[np.ndarray, " n"], length: int, eos_id: int
) -> Int[np.ndarray, " at_most_length"]:
    """`tokens` and EOS in at most `length` positions; what is too long loses its end."""
    return np.append(tokens[: length - 1], eos_id).astype(np.int64)


def plan_rows(
    order: Int[np.ndarray, " N"], lengths: Int[np.ndarray, "N 2"], config: DataConfig
) -> Plan:
    """The examples `order`, of these lengths, in rows that have room for them.

    Each goes to the first open row with room for its inputs and its target. When there are
    OPEN_ROWS already, a new row closes the fullest, by its fuller side.
    """
    row_of = np.empty(len(order), np.int64)
    room: dict[int, tuple[int, int]] = {}  # of the open rows, in their order
    rows, limits = 0, (config.input_length, config.target_length)
    for place, (inputs, target) in enumerate(lengths.tolist()):
        fits = (row for row, left in room.items() if inputs <= left[0] and target <= left[1])
        row = next(fits, rows)
        if row == rows:
            if len(room) == OPEN_ROWS:
                del room[min(room, key=lambda one: _least_left(room[one], limits))]
            room[row] = limits
            rows += 1
        left = room[row]
        room[row] = left[0] - inputs, left[1] - target
        row_of[place] = row
    starts = np.cumsum([0, *np.bincount(row_of, minlength=rows)])
    return Plan(order[row_of.argsort(kind="stable")], starts)


def _least_left(left: tuple[int, int], limits: tuple[int, int]) -> float:
    """The share of a row that is free, on its fuller side."""
    return min(left[0] / limits[0], left[1] / limits[1])


def task_rates(config: DataConfig, rows: Sequence[TaskRows]) -> Float[np.ndarray, " K"]:
    """The share of the examples, or of the tokens, that each task gives; the sum is 1.

    In proportion to min(size, cap) ** (1 / temperature), T5's rule. The cap is in examples.
    """
    cap = np.inf if config.task_cap is None else config.task_cap
    examples = [min(len(part.store), cap) for part in rows]
    if config.task_rates == "equal":
        return rates(examples, 0.0)
    tokens_each = [part.tokens_per_example for part in rows]
    each = [1.0] * len(rows) if config.task_rates == "examples" else tokens_each
    sizes = [count * size for count, size in zip(examples, each, strict=True)]
    return rates(sizes, 1 / config.task_temperature)


def row_rates(
    config: DataConfig, shares: Float[np.ndarray, " K"], rows: Sequence[TaskRows]
) -> Float[np.ndarray, " K"]:
    """The share of the rows that gives each task its share of the examples, or tokens."""
    by_tokens = config.task_rates == "tokens"
    held = [part.tokens_per_row if by_tokens else part.examples_per_row for part in rows]
    weights = shares / np.array(held)
    return weights / weights.sum()


class TaskMixture(Mixture):
    """The batches of a run over one task or several, as seen by one rank. See `Mixture`."""

    def __init__(
        self,
        config: DataConfig,
        stores: Mapping[str, TaskStore],
        eos_id: int,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        check_shares(batch_size, seed, rank, world)
        if not stores:
            raise DataError("None of the tasks has a training split.")
        self.config = config
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.tasks = rows_of_tasks(config, stores, eos_id, seed=seed)
        self.parts = self.tasks  # type: ignore[assignment]
        parts = list(self.tasks.values())
        self.shares = task_rates(config, parts)
        self.turns = MixtureSchedule(row_rates(config, self.shares, parts), seed=seed)


def rows_of_tasks(
    config: DataConfig, stores: Mapping[str, TaskStore], eos_id: int, *, seed: int
) -> dict[str, TaskRows]:
    """The rows of each task."""
    return {
        name: TaskRows(config, store, eos_id, seed=_own_seed(seed, name))
        for name, store in stores.items()
    }


def _own_seed(seed: int, name: str) -> int:
    """A task's order depends on its name, not on its place among the tasks."""
    return int(np.random.SeedSequence([seed, _TASK, *name.encode()]).generate_state(1)[0])
