"""All that a run over tasks reads: a `TextDataset` whose parts are tasks."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from switchworks.batch import Batch
from switchworks.config import ConfigError, DataError
from switchworks.data.config import DataConfig, cache_folder
from switchworks.data.dataset import TextDataset, ValidationSet
from switchworks.data.rows.pipeline import VALIDATION_SEED
from switchworks.data.tasks import Places, Task, find_tasks
from switchworks.data.tasks.rows import TaskMixture, rows_of_tasks, task_rates
from switchworks.data.tasks.store import TaskStore


@dataclass(frozen=True)
class PreparedTask:
    """The tokens of a task. A split that the task does not have is None."""

    task: Task
    train: TaskStore | None
    validation: TaskStore | None
    missing: tuple[int, ...] = ()

    @property
    def stores(self) -> dict[str, TaskStore]:
        """The stores by split."""
        splits = {"train": self.train, "validation": self.validation}
        return {name: store for name, store in splits.items() if store is not None}

    def __str__(self) -> str:
        parts = []
        for split, store in self.stores.items():
            part = f"{split} {len(store):,} examples of {store.num_tokens:,} tokens"
            empty = store.counts.empty
            parts.append(part + (f", {empty} without a target left out" if empty else ""))
        return "; ".join(parts)


@dataclass(frozen=True)
class TaskDataset(TextDataset):
    """One tokenizer, and the tokens of each task by its name."""

    parts: Mapping[str, PreparedTask]  # type: ignore[assignment]

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks, in the order of the settings."""
        return tuple(part.task for part in self.parts.values())

    @property
    def train_tokens(self) -> int:
        return sum(store.num_tokens for store in self._training.values())

    @cached_property
    def rates(self) -> dict[str, float]:
        """The share of the training examples, or tokens, of each task."""
        rows = rows_of_tasks(self.config, self._training, self.tokenizer.eos_id, seed=0)
        if not rows:
            raise DataError("None of the tasks has a training split.")
        shares = task_rates(self.config, list(rows.values()))
        return dict(zip(rows, shares.tolist(), strict=True))

    @property
    def _training(self) -> dict[str, TaskStore]:
        return {name: part.train for name, part in self.parts.items() if part.train is not None}

    def training(self, *, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> TaskMixture:
        """The batches to train on."""
        return TaskMixture(
            self.config,
            self._training,
            self.tokenizer.eos_id,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world=world,
        )

    def held_out(
        self, *, batch_size: int, batches: int, rank: int = 0, world: int = 1
    ) -> ValidationSet:
        """Validation examples of each task as batches, for the loss; metrics are for `evaluate`.

        In the mean every task weighs as much as it does in training; tasks without a training split
        are left out.
        """
        shares = self.rates
        stores = {
            name: part.validation
            for name, part in self.parts.items()
            if name in shares and part.validation is not None
        }
        if not stores:
            raise DataError(
                f"None of the tasks {', '.join(self.parts)} has a validation split beside a "
                "training one.\n  Set --validate-every 0 to train without validation."
            )
        total = sum(shares[name] for name in stores)
        each = -(-batches // len(stores))
        by_task = {
            name: self._batches(name, store, batch_size, each, rank=rank, world=world)
            for name, store in stores.items()
        }
        shares = {name: shares[name] / total for name in stores}
        return ValidationSet.of_batches(by_task, shares, self.tokenizer)

    def _batches(
        self, name: str, store: TaskStore, batch_size: int, limit: int, *, rank: int, world: int
    ) -> list[Batch]:
        """At most `limit` batches; a single one, which repeats examples, if there are too few."""
        only = TaskMixture(
            self.config,
            {name: store},
            self.tokenizer.eos_id,
            batch_size=batch_size,
            seed=VALIDATION_SEED,
            rank=rank,
            world=world,
        )
        full = max(1, only.tasks[name].windows // batch_size)
        return [only.batch(step) for step in range(min(limit, full))]

    def summary(self, batches: TaskMixture, steps: int) -> str:
        """A table: sizes, share of the examples or tokens, epochs, and what rows cut off."""
        epochs = batches.epochs(steps)
        width = max(len("task"), *map(len, self.parts))
        share = "tokens" if self.config.task_rates == "tokens" else "examples"
        lines = [
            f"{'task':<{width}} {'examples':>11} {'tokens':>13} {share:>9} {'epochs':>8}  "
            "inputs/targets cut"
        ]
        for (name, rows), rate in zip(batches.tasks.items(), batches.shares, strict=True):
            lines.append(
                f"{name:<{width}} {len(rows.store):>11,} {rows.store.num_tokens:>13,} {rate:>9.2%} "
                f"{epochs[name]:>8.3g}  {rows.cut[0]:,}/{rows.cut[1]:,}"
            )
        for name, part in self.parts.items():
            stores = part.stores.values()
            if empty := sum(store.counts.empty for store in stores):
                first = next(store.counts.first_empty for store in stores if store.counts.empty)
                lines.append(
                    f"{name}: {empty} examples without a target are left out, the first {first}."
                )
        if any(rows.cut[1] for rows in batches.tasks.values()):
            lines.append(
                f"Targets longer than data.target_length = {self.config.target_length} lose their "
                "end in training (metrics see them whole)."
            )
        return "\n".join(lines)


def places_of(config: DataConfig) -> Places:
    """The folders of the tasks of `config`. Raises ConfigError for a task folder that does not
    exist, because the Hub would be read instead."""
    folder = None if config.task_folder is None else Path(config.task_folder).expanduser()
    if folder is not None and not folder.is_dir():
        raise ConfigError(
            f"data.task_folder: {folder} is no folder.\n  Name the one with a folder for each "
            "task: --data.task-folder FOLDER (evaluate: --task-folder)."
        )
    return Places(cache_folder(config), folder, config.validation_share)


def tasks_of(config: DataConfig) -> tuple[Task, ...]:
    """The tasks that `config` names."""
    return find_tasks(config.tasks, metrics=config.task_metrics, labels=config.task_labels)
