"""A teacher's probabilities on disk: it runs once, for any number of students.

Of each real target the k likeliest ids are kept, the logarithms of their probabilities and that of
the mass of all other ids together. A store is a folder:

    rows-000000000-000004096.safetensors   the rows 0 to 4095 of a run
        ids      uint16, or uint32 for large vocabularies    N k      likeliest first
        logs     float16 or float32                          N k+1    the last: of all other ids
        ends     int64     R    where each row's targets end among the N
        hashes   uint64    R    of each row's inputs, targets and segments
    store.json                             whose probabilities, of what

Rows are those of the run the store was made for, numbered across its steps, and whoever reads one
shows the row it has: by its hash a student is never taught with the answers to another text. Parts
are written aside and renamed, so a killed writer goes on with the row after the last whole part.

Letters: B sequences, T target length, V vocabulary, k ids kept, N targets, R rows.
"""

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from switchworks.batch import Batch
from switchworks.checkpoint import read_json
from switchworks.config import ConfigError, DataError
from switchworks.data import atomic_write_json

VERSION = 1
FILE = "store.json"
PART_ROWS = 4096
"""Rows of a part: what is in memory before it is written, and what a killed writer loses."""

Dtype = Literal["float16", "float32"]


class TeacherTargets(NamedTuple):
    """A teacher's probabilities for the targets of a batch."""

    ids: Int[Tensor, "B T k"]
    """The likeliest first."""
    logs: Float[Tensor, "B T k1"]
    """Their logarithms and, last, that of the mass of all other ids; they sum to 1."""


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """Whose probabilities a store holds, of what, and how."""

    teacher: str = field(compare=False)
    """Where it was."""
    weights: str
    """A hash of the teacher's weights."""
    tokenizer: str
    """Its fingerprint."""
    vocab_size: int
    """V: rows of the teacher's embedding."""
    top_k: int
    temperature: float
    dtype: Dtype
    precision: Literal["float32", "bfloat16", "float64", "auto"]
    """What the teacher computed in."""
    seed: int
    """Of the run whose rows these are."""
    data: dict[str, Any]
    """That run's settings of data."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.vocab_size:
            raise ConfigError(
                f"--top-k {self.top_k} is not between 1 and the {self.vocab_size} ids of the "
                "teacher.\n  16 to 64 keep nearly all of its probability."
            )

    @property
    def id_type(self) -> Literal["uint16", "uint32"]:
        """The smallest that holds an id."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    @property
    def bytes_per_target(self) -> int:
        """Of ids and logarithms. A row has 16 bytes more, a part a header of 400."""
        number = np.dtype(self.dtype).itemsize
        return self.top_k * np.dtype(self.id_type).itemsize + (self.top_k + 1) * number


class LogitStore:
    """A store that is there, to read. Its parts are memory-mapped."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError if `folder` holds no store, or one of another version."""
        self.folder = folder
        if not is_store(folder):
            raise DataError(
                f"There are no probabilities of a teacher in {folder}.\n"
                f"  Make them: switchworks prepare RECIPE --distil.store {folder}, with the flags "
                "of the training."
            )
        values = read_json(folder / FILE)
        if values.pop("version", None) != VERSION:
            raise DataError(
                f"{folder} was written by another version of switchworks. Make it anew."
            )
        self.info = StoreInfo(**values)
        self._parts = parts_in(folder)
        self._open: dict[Path, Any] = {}

    @property
    def num_rows(self) -> int:
        """Rows of the run, from its first on, that are there without a gap."""
        return self._parts[-1][1] if self._parts else 0

    @property
    def num_targets(self) -> int:
        return sum(self._file(path).get_slice("ids").get_shape()[0] for _, _, path in self._parts)

    @property
    def num_bytes(self) -> int:
        """On the disk."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())

    def taught(self, rows: Sequence[int], batch: Batch) -> TeacherTargets:
        """The teacher's probabilities for `batch`, whose rows have these consecutive numbers.

        What stands at padding means nothing. Raises DataError for a row that is not in the store,
        or not as it was.
        """
        targets = batch.targets
        hashes = hashes_of(batch)
        ids = torch.arange(self.info.top_k).expand(*targets.shape, -1).clone()
        logs = torch.zeros(*targets.shape, self.info.top_k + 1)
        place, first, last = 0, rows[0], rows[-1] + 1
        while first < last:
            start, stop, path = self._part(first)
            stop = min(stop, last)
            count = stop - first
            part = self._read(path, first - start, count, hashes[place : place + count], first)
            real = targets[place : place + count].cpu() != 0
            ids[place : place + count][real] = part.ids
            logs[place : place + count][real] = part.logs
            place, first = place + count, stop
        device = targets.device
        return TeacherTargets(ids.to(device), logs.log_softmax(dim=-1).to(device))

    def _read(
        self, path: Path, place: int, count: int, hashes: np.ndarray, row: int
    ) -> "TeacherTargets":
        """N k and N k+1 of `count` rows from the `place`-th of a part; their hashes must agree."""
        file = self._file(path)
        found = file.get_slice("hashes")[place : place + count]
        if (other := np.flatnonzero(found != hashes)).size:
            raise DataError(
                f"Row {row + int(other[0])} of the training is not the one that the teacher's "
                f"probabilities in {self.folder} are for.\n"
                "  Its text, tokenizer, seed or row lengths have changed; make the store anew."
            )
        ends = file.get_slice("ends")
        begin = int(ends[place - 1 : place][0]) if place else 0
        end = int(ends[place + count - 1 : place + count][0])
        return TeacherTargets(
            torch.from_numpy(file.get_slice("ids")[begin:end].astype(np.int64)),
            torch.from_numpy(file.get_slice("logs")[begin:end].astype(np.float32)),
        )

    def _part(self, row: int) -> tuple[int, int, Path]:
        number = bisect_right([start for start, _, _ in self._parts], row) - 1
        if number < 0 or row >= self._parts[number][1]:
            raise DataError(
                f"{self.folder} holds the teacher's probabilities for {self.num_rows:,} rows, and "
                f"row {row:,} is wanted.\n  The command that made it goes on with more --steps."
            )
        return self._parts[number]

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="numpy")
            except (OSError, SafetensorError) as error:
                raise DataError(
                    f"{path} cannot be read: {error}.\n  Delete it and what follows it, and make "
                    "them again."
                ) from error
        return self._open[path]


class LogitWriter:
    """A store that grows, row after row."""

    def __init__(self, folder: Path, info: StoreInfo) -> None:
        """`folder` is begun, or gone on with. Raises ConfigError if it holds another store."""
        self.folder, self.info = folder, info
        if is_store(folder):
            there = LogitStore(folder).info
            if there != info:
                raise ConfigError(
                    f"{folder} holds other probabilities. They differ in:\n"
                    + "".join(f"    {line}\n" for line in info_differences(there, info))
                    + "  Choose another --distil.store, or delete that one."
                )
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(
                f"{folder} holds other files.\n  Choose another --distil.store, or an empty one."
            )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write_json(folder / FILE, {"version": VERSION, **asdict(info)})
        parts = parts_in(folder)
        self.written = parts[-1][1] if parts else 0
        """Rows on the disk."""
        self._rows: list[np.ndarray] = []
        self._ids: list[np.ndarray] = []
        self._logs: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []

    def add(self, batch: Batch, logits: Float[Tensor, "B T V"]) -> None:
        """The rows that come next, and the teacher's logits for them.

        Raises DataError if a logit is not finite.
        """
        real = batch.targets != 0
        ids, logs = likeliest(logits[real], self.info.top_k, self.info.temperature)
        if not bool(logs[:, 0].isfinite().all()):
            raise DataError(
                f"The teacher's logits are not finite in {self.info.precision}.\n"
                "  Try --precision float32."
            )
        self._rows.append(hashes_of(batch))
        self._ids.append(ids.cpu().numpy().astype(self.info.id_type))
        self._logs.append(logs.cpu().numpy().astype(self.info.dtype))
        self._counts.append(real.sum(dim=1).cpu().numpy())
        if sum(map(len, self._rows)) >= PART_ROWS:
            self.flush()

    def flush(self) -> None:
        """All rows so far are on the disk."""
        if not self._rows:
            return
        stop = self.written + sum(map(len, self._rows))
        tensors = {
            "ids": np.concatenate(self._ids),
            "logs": np.concatenate(self._logs),
            "ends": np.concatenate(self._counts).cumsum(),
            "hashes": np.concatenate(self._rows),
        }
        path = self.folder / f"rows-{self.written:09d}-{stop:09d}.safetensors"
        aside = path.with_suffix(".partial")
        save_file(tensors, aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
        self.written = stop
        for rows in (self._rows, self._ids, self._logs, self._counts):
            rows.clear()


def likeliest(
    logits: Float[Tensor, "N V"], top_k: int, temperature: float
) -> tuple[Int[Tensor, "N k"], Float[Tensor, "N k1"]]:
    """The `top_k` likeliest ids of each row, and the logarithms of their probabilities at this
    temperature with, last, that of the mass of all others, which is that of 0 if there are none."""
    wide = logits.float() / temperature
    values, ids = wide.topk(top_k, dim=-1)
    others = wide.scatter(-1, ids, float("-inf")).logsumexp(dim=-1, keepdim=True)
    return ids, torch.cat([values, others], dim=-1) - wide.logsumexp(dim=-1, keepdim=True)


def hashes_of(batch: Batch) -> np.ndarray:
    """A number for each row: of its inputs, targets and segments."""
    parts = [batch.inputs, batch.targets, batch.input_segments, batch.target_segments]
    columns = [part.cpu().numpy().astype("<i8") for part in parts if part is not None]
    widths = np.array([len(columns), *(column.shape[1] for column in columns)], "<i8").tobytes()
    return np.array(
        [
            int.from_bytes(
                blake2b(
                    widths + b"".join(column[row].tobytes() for column in columns), digest_size=8
                ).digest(),
                "little",
            )
            for row in range(len(columns[0]))
        ],
        np.uint64,
    )


def is_store(folder: Path) -> bool:
    """Whether `folder` holds probabilities of a teacher, or is about to."""
    return (folder / FILE).is_file()


def parts_in(folder: Path) -> list[tuple[int, int, Path]]:
    """(first row, row after the last, file) of the parts of a store that follow without a gap."""
    parts: list[tuple[int, int, Path]] = []
    for path in sorted(folder.glob("rows-*.safetensors")):
        _, start, stop = path.stem.split("-")
        if int(start) != (parts[-1][1] if parts else 0):
            break
        parts.append((int(start), int(stop), path))
    return parts


def info_differences(there: StoreInfo, here: StoreInfo) -> list[str]:
    """A line for each value in which two stores differ, settings of the text one by one."""
    left, right = _flat(there), _flat(here)
    return [
        f"{name}: {left.get(name)} there, {right.get(name)} here"
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    ]


def _flat(info: StoreInfo) -> dict[str, Any]:
    values = asdict(info)
    return {f"data.{name}": value for name, value in values.pop("data").items()} | values
