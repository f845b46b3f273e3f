"""All that a run over tasks reads: a `TextDataset` whose parts are tasks."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

from switchworks.config import ConfigError, DataError
from switchworks.data.config import DataConfig, cache_folder
from switchworks.data.dataset import TextDataset
from switchworks.data.rows.mixture import Mixture
from switchworks.data.rows.pipeline import RunRows
from switchworks.data.sources.tables import TableFormat
from switchworks.data.tasks import Places, Task, find_tasks
from switchworks.data.tasks.rows import TaskRows, rows_of_tasks, task_mixture, task_rates
from switchworks.data.tasks.store import TaskStore, label_counts


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
            parts.append(" ".join([part, *store.counts.notes()]))
        return "; ".join(parts)


@dataclass(frozen=True)
class TaskDataset(TextDataset):
    """One tokenizer, and the tokens of each task by its name."""

    parts: Mapping[str, PreparedTask]  # type: ignore[assignment]

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks, in the order of the settings."""
        return tuple(part.task for part in self.parts.values())

    @cached_property
    def label_counts(self) -> dict[str, dict[str, int]]:
        """Of each task that is a classification by what it trains on."""
        stores = self._stores("train").items()
        counts = {name: label_counts(store, self.tokenizer) for name, store in stores}
        return {name: each for name, each in counts.items() if each}

    @cached_property
    def rates(self) -> dict[str, float]:
        """The share of the training examples, or tokens, of each task."""
        rows = rows_of_tasks(self.config, self._stores("train"), self.tokenizer.eos_id, seed=0)
        shares = task_rates(self.config, list(rows.values()))
        return dict(zip(rows, shares.tolist(), strict=True))

    def _stores(self, split: str) -> dict[str, TaskStore]:
        """Validation examples are for the loss, of tasks that are trained on; metrics are for
        `evaluate`."""
        stores = {
            name: part.stores[split] for name, part in self.parts.items() if split in part.stores
        }
        if split == "train":
            return stores
        stores = {name: store for name, store in stores.items() if name in self.rates}
        if not stores:
            raise DataError(
                f"None of the tasks {', '.join(self.parts)} has a validation split beside a "
                "training one.\n  Set --validate-every 0 to train without validation."
            )
        return stores

    def _stream(self, stores: Mapping[str, TaskStore], run: RunRows) -> Mixture:
        return task_mixture(self.config, stores, self.tokenizer.eos_id, run)

    def _held_out(self, name: str, store: TaskStore, run: RunRows) -> Mixture:
        return self._stream({name: store}, run)

    def summary(self, batches: Mixture, steps: int) -> str:
        """A table: sizes, share of the examples or tokens, epochs, and what rows cut off."""
        epochs, tasks = batches.epochs(steps), cast("Mapping[str, TaskRows]", batches.parts)
        width = max(len("task"), *map(len, self.parts))
        share = "tokens" if self.config.task_rates == "tokens" else "examples"
        lines = [
            f"{'task':<{width}} {'examples':>11} {'tokens':>13} {share:>9} {'epochs':>8}  "
            "inputs/targets cut"
        ]
        for name, rows in tasks.items():
            lines.append(
                f"{name:<{width}} {len(rows.store):>11,} {rows.store.num_tokens:>13,} "
                f"{self.rates[name]:>9.2%} {epochs[name]:>8.3g}  {rows.cut[0]:,}/{rows.cut[1]:,}"
            )
        for name, part in self.parts.items():
            for split, store in part.stores.items():
                lines += [f"{name}, {split}: {note}" for note in store.counts.notes()]
        if any(rows.cut[1] for rows in tasks.values()):
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
    delimiter = "\t" if config.task_delimiter == "tab" else config.task_delimiter
    table = TableFormat(delimiter=delimiter, quoting=config.task_quoting)
    return Places(
        cache_folder(config), folder, config.validation_share, table, config.task_skip_bad
    )


def tasks_of(config: DataConfig) -> tuple[Task, ...]:
    """The tasks that `config` names."""
    return find_tasks(config.tasks, metrics=config.task_metrics, labels=config.task_labels)
