"""All that a run over tasks reads, in the shape that runs over text have: `TextDataset`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from switchworks.batch import Batch
from switchworks.config import ConfigError, DataError
from switchworks.data.config import DataConfig
from switchworks.data.dataset import TextDataset, ValidationSet
from switchworks.data.rows.pipeline import VALIDATION_SEED
from switchworks.data.tasks import Places, Task, find_tasks
from switchworks.data.tasks.own import fingerprint
from switchworks.data.tasks.rows import TaskMixture, rows_of_tasks, task_rates
from switchworks.data.tasks.store import Counts, TaskStore, examples_of, open_task
from switchworks.data.tokens.coverage import byte_lengths, tokens_and_bytes
from switchworks.data.tokens.prepare import cache_folder, trained_tokenizer
from switchworks.data.tokens.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class PreparedTask:
    """A task's tokens. A split that the task has not is None."""

    task: Task
    train: TaskStore | None
    validation: TaskStore | None
    missing: tuple[int, ...] = ()

    def __str__(self) -> str:
        parts = []
        for name, store in (("train", self.train), ("validation", self.validation)):
            if store is not None:
                left = f", {store.counts.empty} without a target left out" * bool(
                    store.counts.empty
                )
                parts.append(f"{name} {len(store):,} examples of {store.num_tokens:,} tokens{left}")
        return "; ".join(parts)


@dataclass(frozen=True)
class TaskDataset(TextDataset):
    """One tokenizer, and the tokens of each task by its name."""

    parts: Mapping[str, PreparedTask]  # type: ignore[assignment]

    @property
    def tasks(self) -> tuple[Task, ...]:
        """In the order of the settings."""
        return tuple(part.task for part in self.parts.values())

    @property
    def train_tokens(self) -> int:
        return sum(store.num_tokens for store in self._training.values())

    @cached_property
    def rates(self) -> dict[str, float]:
        """The share of the examples, or tokens, that each task gives to training."""
        rows = rows_of_tasks(self.config, self._training, self.tokenizer.eos_id, seed=0)
        if not rows:
            raise DataError("None of the tasks has a training split.")
        shares = task_rates(self.config, list(rows.values()))
        return dict(zip(rows, shares.tolist(), strict=True))

    @property
    def _training(self) -> dict[str, TaskStore]:
        stores = {name: part.train for name, part in self.parts.items()}
        return {name: store for name, store in stores.items() if store is not None}

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

        In the mean every task weighs as much as it does in training; of those without a training
        split nothing is in it.
        """
        shares = self.rates
        stores = {name: part.validation for name, part in self.parts.items() if name in shares}
        found = {name: store for name, store in stores.items() if store is not None}
        if not found:
            raise DataError(
                f"None of the tasks {', '.join(self.parts)} has a validation split beside a "
                "training one.\n  Set --validate-every 0 to train without validation."
            )
        total = sum(shares[name] for name in found)
        each = -(-batches // len(found))
        part = {"rank": rank, "world": world}
        rows = {n: self._batches(n, store, batch_size, each, **part) for n, store in found.items()}
        lengths = byte_lengths(self.tokenizer)
        return ValidationSet(
            rows,
            {name: shares[name] / total for name in found},
            {name: tokens_and_bytes(own, lengths) for name, own in rows.items()},
        )

    def _batches(
        self, name: str, store: TaskStore, batch_size: int, most: int, *, rank: int, world: int
    ) -> list[Batch]:
        """At most `most` batches; one, which repeats examples, if there are fewer."""
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
        return [only.batch(step) for step in range(min(most, full))]

    def summary(self, batches: TaskMixture, steps: int) -> str:
        """A table: sizes, share of the examples or tokens, epochs, and what rows cut off."""
        epochs = batches.epochs(steps)
        wide = max(len("task"), *map(len, self.parts))
        share = "tokens" if self.config.task_rates == "tokens" else "examples"
        lines = [
            f"{'task':<{wide}} {'examples':>11} {'tokens':>13} {share:>9} {'epochs':>8}  "
            "inputs/targets cut"
        ]
        for (name, rows), rate in zip(batches.tasks.items(), batches.shares, strict=True):
            lines.append(
                f"{name:<{wide}} {len(rows.store):>11,} {rows.store.num_tokens:>13,} {rate:>9.2%} "
                f"{epochs[name]:>8.3g}  {rows.cut[0]:,}/{rows.cut[1]:,}"
            )
        for name, part in self.parts.items():
            stores = [store for store in (part.train, part.validation) if store is not None]
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
    """Where the tasks of `config` have their data. Raises ConfigError for a folder that is not
    there, instead of which the Hub would be read."""
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


def prepare_tasks(config: DataConfig, *, vocab_size: int, quiet: bool = False) -> TaskDataset:
    """The tokenizer and the tokens of every task; what is missing is made, the rest is opened.

    A tokenizer trained here learns from the tasks' own text; a model that is fine-tuned needs its
    own. Raises ConfigError for names and DataError for data that cannot be used.
    """
    tasks, places = tasks_of(config), places_of(config)
    tokenizer = _tokenizer(config, tasks, places, vocab_size, quiet)
    parts: dict[str, PreparedTask] = {}
    for task in tasks:
        train, validation = (
            open_task(task, split, places, tokenizer) if split in task.source.splits else None
            for split in ("train", "validation")
        )
        parts[task.name] = PreparedTask(task, train, validation)
    return TaskDataset(config, tokenizer, parts)


def _tokenizer(
    config: DataConfig, tasks: tuple[Task, ...], places: Places, vocab_size: int, quiet: bool
) -> Tokenizer:
    if config.tokenizer != "train":
        return load_tokenizer(config.tokenizer)
    learnt = [task for task in tasks if "train" in task.source.splits]
    named = [fingerprint(task, "train", places) for task in learnt]

    def texts() -> Iterator[str]:
        for task in learnt:
            for example in examples_of(task, "train", places, Counts()):
                yield f"{example.inputs}\n{example.target}"

    return load_tokenizer(
        trained_tokenizer(
            places.cache,
            repr(named),
            texts(),
            vocab_size,
            quiet,
            coverage=config.character_coverage,
        )
    )
