"""Tokenised examples of a task on disk: memory-mapped, random access, complete or absent.

A store is a folder with the tokens of all examples end to end, inputs and target in turn
(ids.bin), the position where each of them ends (ends.npy) and counts (about.json). Texts are stored
in full and without EOS, so that the lengths of rows do not matter. Letters: N examples.
"""

import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Int

from switchworks.config import DataError, from_dict
from switchworks.data.cache import digest
from switchworks.data.tasks.sources import Places
from switchworks.data.tasks.task import UNKNOWN, Example, Task
from switchworks.data.tasks.user_tasks import task_fingerprint
from switchworks.data.tokens.build import token_dtype
from switchworks.data.tokens.store import file_hash, token_digest
from switchworks.data.tokens.tokenizer import Tokenizer
from switchworks.disk import read_sealed, well_formed, write_sealed

MAX_EMPTY_SHARE = 1e-3
"""A larger share of training examples without a target is an error: then a column is wrong. A few
are left out and counted, and so are those of other splits: real datasets have them."""

TASK_STORE_VERSION = 5
"""Raised when the content of stores changes, so that no older one is opened."""

BATCH_EXAMPLES = 4096
"""Examples tokenised at once."""


@dataclass
class Counts:
    """Counts of the examples of a split."""

    examples: int = 0
    """Usable examples."""
    empty: int = 0
    """Examples left out because the target is empty or its label is withheld."""
    first_empty: str = ""
    """The record and input of the first of these."""
    bad: int = 0
    """Records left out because they cannot be read, as `Places.skip_bad` allows."""
    first_bad: str = ""
    unwritable: int = 0
    """Examples with a target that the tokenizer does not give back from its ids."""
    first_unwritable: str = ""

    def notes(self) -> list[str]:
        """A line on each kind that there is."""
        kinds = (
            (self.empty, "examples without a target are left out", self.first_empty),
            (self.bad, "records that cannot be read are left out", self.first_bad),
            (
                self.unwritable,
                "targets cannot be written with the tokenizer, so no answer equals them",
                self.first_unwritable,
            ),
        )
        return [f"{count} {kind}, the first {first}." for count, kind, first in kinds if count]


class TaskStore:
    """The examples in `folder`, in the order of the dataset."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError if a file of it is missing or has changed."""
        try:
            about = read_sealed(folder / "about.json")
            if about.get("hashes") != _hashes(folder):
                raise DataError(f"{folder} has changed: a hash differs. It is made again.")
        except FileNotFoundError as error:
            raise DataError(f"{error.filename} is missing. It is made again.") from error
        with well_formed(str(folder), DataError, "Delete it; it is made again."):
            self.counts = from_dict(Counts, about["counts"])
            self.ends: Int[np.ndarray, "N 2"] = np.load(folder / "ends.npy", mmap_mode="r")
            if self.ends.dtype != np.int64 or self.ends.shape != (self.counts.examples, 2):
                raise ValueError("ends.npy does not hold a pair of positions for each example")
            if np.any(np.diff(self.ends.reshape(-1), prepend=0) < 0):
                raise ValueError("the positions in ends.npy do not rise")
            size = int(self.ends[-1, 1]) if len(self.ends) else 0
            self.ids = np.memmap(folder / "ids.bin", about["dtype"], "r", shape=(size,))

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def digest(self) -> str:
        """Hexadecimal, see `token_digest`; of the tokens and of where examples end."""
        return "".join(
            token_digest(part.size, lambda start, stop, part=part: part.reshape(-1)[start:stop])
            for part in (self.ids, self.ends)
        )

    @property
    def num_documents(self) -> int:
        """The number of examples, under the name of a `TokenStore`."""
        return len(self)

    @property
    def num_tokens(self) -> int:
        """Tokens of inputs and targets, without EOS."""
        return len(self.ids)

    def example(self, index: int) -> tuple[Int[np.ndarray, " input"], Int[np.ndarray, " target"]]:
        """The tokens of inputs and target of one example."""
        start = int(self.ends[index - 1, 1]) if index else 0
        middle, stop = (int(end) for end in self.ends[index])
        tokens = np.asarray(self.ids[start:stop], np.int64)
        return tokens[: middle - start], tokens[middle - start :]

    def lengths(self) -> Int[np.ndarray, "N 2"]:
        """The number of tokens of every example's inputs and target."""
        return np.diff(self.ends.reshape(-1), prepend=0).reshape(-1, 2)


MAX_CLASSES = 64


def are_classes(targets: int, examples: int) -> bool:
    """Whether so many different targets of so many examples are classes: few, which occur five
    times each in the mean."""
    return 0 < targets <= MAX_CLASSES and examples >= 5 * targets


def label_counts(store: TaskStore, tokenizer: Tokenizer) -> dict[str, int]:
    """How often each target of `store` occurs, if they are classes. Else none."""
    counts = Counter[bytes]()
    for index in range(len(store)):
        counts[store.example(index)[1].tobytes()] += 1
        if len(counts) > MAX_CLASSES:
            break
    if not are_classes(len(counts), len(store)):
        return {}
    texts = {tokenizer.decode(np.frombuffer(ids, np.int64)): n for ids, n in counts.items()}
    return dict(sorted(texts.items()))


def examples_of(
    task: Task, split: str, places: Places, counts: Counts, *, judged: bool = False
) -> Iterator[Example]:
    """The examples of a split that have a target, in order; `counts` grows while they are read.

    `judged`: those to judge answers by, else those to train on or to take the loss of. Raises
    DataError for a record that cannot be read, with its number, for a split without examples, and
    if more than MAX_EMPTY_SHARE of those to train on have no target.
    """
    if split not in task.source.splits:
        raise DataError(
            f"Task {task.name!r} has no {split} split. It has: {', '.join(task.source.splits)}."
        )
    for number, record in enumerate(task.source.records(split, places), start=1):
        try:
            examples = task.examples(record, split, judged=judged) if record else []
        except DataError as error:
            if not places.skip_bad:
                raise DataError(
                    f"{error}\n  (record {number} of {split}) Mend it, or leave out and count all "
                    "such records: --data.task-skip-bad (evaluate: --task-skip-bad)."
                ) from error
            counts.bad += 1
            reason = str(error).partition("\n")[0].removesuffix(".")
            counts.first_bad = counts.first_bad or f"record {number} of {split}: {reason}"
            continue
        for example in examples:
            if example.target.strip() and (split == "test" or example.target != UNKNOWN):
                counts.examples += 1
                yield example
            else:
                counts.empty += 1
                label = f"record {number} of {split}, with the input {example.inputs[:60]!r}"
                counts.first_empty = counts.first_empty or label
    if counts.bad:
        logging.getLogger(__name__).warning("%s: %s", task.name, "\n".join(counts.notes()))
    if split == "train" and not judged:
        _check_empty(task, counts)
    if not counts.examples:
        raise DataError(
            f"Task {task.name!r} has no examples in {split}, of {counts.empty} without a target "
            f"and {counts.bad} that cannot be read.\n"
            "  Of a table that is one file, --data.validation-share says how much training holds "
            "out, by a hash of the inputs;\n"
            "  `switchworks evaluate --split all` measures all of it."
        )


def _check_empty(task: Task, counts: Counts) -> None:
    total = counts.examples + counts.empty
    if counts.empty > MAX_EMPTY_SHARE * total:
        raise DataError(
            f"Task {task.name!r}: {counts.empty} of {total} examples of train have an empty "
            f"target, the first\n  {counts.first_empty}.\n"
            "  Fill the column in, name another, or take these rows out."
        )


def open_task(task: Task, split: str, places: Places, tokenizer: Tokenizer) -> TaskStore:
    """The store of a split, made in the cache if it is missing. Raises DataError for bad data."""
    key = digest(task_fingerprint(task, split, places), tokenizer.fingerprint, TASK_STORE_VERSION)
    check_labels(task, tokenizer)
    folder = places.cache / f"task-{task.name}-{split}-{key[:16]}"
    if folder.is_dir():
        try:
            return TaskStore(folder)
        except DataError as error:
            logging.getLogger(__name__).warning("%s", error)
            shutil.rmtree(folder)
    counts = Counts()
    _build(folder, examples_of(task, split, places, counts), tokenizer, counts)
    return TaskStore(folder)


def _build(folder: Path, examples: Iterator[Example], tokenizer: Tokenizer, counts: Counts) -> None:
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    dtype, ends, size = token_dtype(tokenizer), [np.zeros((0, 2), np.int64)], 0
    try:
        with (temporary / "ids.bin").open("wb") as file:
            while batch := list(islice(examples, BATCH_EXAMPLES)):
                parts = _tokens(batch, tokenizer)
                _count_unwritable(batch, parts[1::2], tokenizer, counts)
                ends.append(size + np.cumsum([len(part) for part in parts]).reshape(-1, 2))
                size = int(ends[-1][-1, 1])
                file.write(np.concatenate(parts).astype(dtype).tobytes())
            file.flush()
            os.fsync(file.fileno())
        np.save(temporary / "ends.npy", np.concatenate(ends))
        about = {"dtype": dtype, "counts": asdict(counts), "hashes": _hashes(temporary)}
        write_sealed(temporary / "about.json", about)
        if not folder.is_dir():  # another process may have been faster, with the same result
            temporary.replace(folder)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written: {error.strerror}.\n"
            "  Make room, or set --data.cache to another disk."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _hashes(folder: Path) -> dict[str, str]:
    return {name: file_hash(folder / name) for name in ("ids.bin", "ends.npy")}


def _tokens(batch: list[Example], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Ids of inputs and target of the first example, of the second, and so on."""
    threads = os.cpu_count() or 1
    inputs = tokenizer.encode_batch([example.inputs for example in batch], threads=threads)
    targets = tokenizer.encode_batch([example.target for example in batch], threads=threads)
    return [part for pair in zip(inputs, targets, strict=True) for part in pair]


def _count_unwritable(
    batch: list[Example], targets: list[np.ndarray], tokenizer: Tokenizer, counts: Counts
) -> None:
    for example, ids in zip(batch, targets, strict=True):
        if (text := tokenizer.decode(ids)) != example.target:
            counts.unwritable += 1
            first = f"{example.target[:60]!r}, which comes back as {text[:60]!r}"
            counts.first_unwritable = counts.first_unwritable or first


def check_labels(task: Task, tokenizer: Tokenizer) -> None:
    """Raises DataError if two labels of `task` have the same ids."""
    labels: dict[tuple[int, ...], str] = {}
    for label, ids in zip(task.labels, tokenizer.encode_batch(task.labels), strict=True):
        other = labels.setdefault(tuple(ids.tolist()), label)
        if other != label:
            raise DataError(
                f"Task {task.name!r}: the tokenizer gives its labels {other!r} and {label!r} the "
                f"same ids, {ids.tolist()}.\n  Name the labels in characters that it has pieces "
                "for, or use another tokenizer: --data.tokenizer bytes can write any."
            )
