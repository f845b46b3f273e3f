"""A teacher's probabilities on disk: it runs once, for any number of students.

A store is a folder of parts, and `store.json`, its `StoreInfo`. A part holds, for each target that
is not padding, the k most likely ids and their log-probabilities:

    rows-000000000-000004096.safetensors   rows 0 to 4095 of a run
        ids      uint16, or uint32 for large vocabularies    N k      most likely first
        logs     float16 or float32                          N k+1    the last: all other ids
        ends     int64     R    where each row's targets end among the N
        hashes   uint64    R    of each row's inputs, targets and segments
        checks   uint64    R    of each row's ids and logs, and of its hash

Rows are numbered across the steps of a run. Reading compares both hashes of each row. Parts are
written aside and renamed: a killed writer continues with the row after the last complete part.

Letters: B sequences, T target length, V vocabulary, k ids kept, N targets, R rows.
"""

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
from switchworks.config import ConfigError, DataError, differences, from_dict
from switchworks.disk import read_sealed, whole_file, write_sealed

VERSION = 2
FILE = "store.json"
PART_ROWS = 4096
"""Rows of a part: kept in memory until it is written, and lost when the writer is killed."""

Dtype = Literal["float16", "float32"]


class TeacherTargets(NamedTuple):
    """A teacher's probabilities for the targets of a batch."""

    ids: Int[Tensor, "B T k"]
    """The most likely ids, in that order."""
    logs: Float[Tensor, "B T k1"]
    """Log-probabilities of these ids and, last, of all other ids together; they sum to 1."""


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """What a store holds: of which teacher, for which rows, in which format."""

    teacher: str = field(compare=False)
    """Path of the teacher when the store was made."""
    weights: str
    """Hash of the teacher's weights."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    vocab_size: int
    """V: rows of the teacher's embedding."""
    top_k: int
    temperature: float
    dtype: Dtype
    precision: Literal["float32", "bfloat16", "float64", "auto"]
    """In which the teacher computed."""
    seed: int
    """Seed of the run, which decides its rows."""
    data: dict[str, Any]
    """Data settings of the run that change its rows."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.vocab_size:
            raise ConfigError(
                f"--top-k {self.top_k} is not between 1 and the {self.vocab_size} ids of the "
                "teacher.\n  16 to 64 keep nearly all of the probability."
            )

    @property
    def id_type(self) -> Literal["uint16", "uint32"]:
        """The smaller type that holds every id."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"


class LogitStore:
    """Reads a store. Its parts are memory-mapped."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError if `folder` holds no store, or one of another version."""
        self.folder = folder
        if not is_store(folder):
            raise DataError(
                f"{folder} holds no teacher probabilities.\n"
                f"  Make them: switchworks prepare RECIPE --distil.store {folder}, with the flags "
                "of the training."
            )
        values = read_sealed(folder / FILE)
        if values.pop("version", None) != VERSION:
            raise DataError(f"{folder} was made by another version of switchworks. Make it anew.")
        self.info = from_dict(StoreInfo, values)
        self.path, self.weights = self.info.teacher, self.info.weights
        """Path of the teacher, and hash of its weights."""
        self.vocab_size = self.info.vocab_size
        self._parts = parts_in(folder)
        self.num_rows = self._parts[-1][1] if self._parts else 0
        """Rows from the first on, without a gap."""
        self._open: dict[Path, Any] = {}

    @property
    def num_targets(self) -> int:
        return sum(self._file(path).get_slice("ids").get_shape()[0] for _, _, path in self._parts)

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())

    def read(self, rows: Sequence[int], batch: Batch) -> TeacherTargets:
        """The teacher's probabilities for `batch`, whose rows have these consecutive numbers.

        Values at padding are meaningless. Raises DataError for a row that is not in the store, or
        whose hash differs.
        """
        targets = batch.targets
        hashes = row_hashes(batch)
        ids = torch.arange(self.info.top_k).expand(*targets.shape, -1).clone()
        logs = torch.zeros(*targets.shape, self.info.top_k + 1)
        row = rows[0]
        while row <= rows[-1]:
            start, stop, path = self._part(row)
            here = slice(row - rows[0], min(stop - 1, rows[-1]) - rows[0] + 1)
            part = self._read_part(path, row - start, hashes[here], row)
            real = targets[here].cpu() != 0
            ids[here][real], logs[here][real] = part.ids, part.logs
            row = stop
        device = targets.device
        return TeacherTargets(ids.to(device), logs.log_softmax(dim=-1).to(device))

    def _read_part(self, path: Path, place: int, hashes: np.ndarray, row: int) -> TeacherTargets:
        """N k and N k+1 of the rows from `place` of a part on, which must have these hashes."""
        file = self._file(path)
        stored = file.get_slice("hashes")[place : place + len(hashes)]
        if (other := np.flatnonzero(stored != hashes)).size:
            raise DataError(
                f"Row {row + int(other[0])} of this run is not the row whose teacher probabilities "
                f"are in {self.folder}.\n"
                "  Its text, tokenizer, seed or row lengths have changed; make the store anew."
            )
        rows = slice(place, place + len(hashes))
        ends = file.get_slice("ends")[rows]
        begin = int(file.get_slice("ends")[place - 1 : place][0]) if place else 0
        ids, logs = (file.get_slice(name)[begin : int(ends[-1])] for name in ("ids", "logs"))
        checks = _checks(ids, logs, ends - begin, hashes)
        if (wrong := np.flatnonzero(file.get_slice("checks")[rows] != checks)).size:
            raise _damaged(path, f"row {row + int(wrong[0])} is not what was written")
        return TeacherTargets(
            torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(logs.astype(np.float32))
        )

    def _part(self, row: int) -> tuple[int, int, Path]:
        number = bisect_right([start for start, _, _ in self._parts], row) - 1
        if number < 0 or row >= self._parts[number][1]:
            raise DataError(
                f"{self.folder} holds the teacher's probabilities for {self.num_rows:,} rows, and "
                f"row {row:,} is needed.\n  The command that made it continues with more --steps."
            )
        return self._parts[number]

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="numpy")
                rows = int(path.stem.split("-")[2]) - int(path.stem.split("-")[1])
                shapes = [self._open[path].get_slice(name).get_shape() for name in _COLUMNS]
                size, k = shapes[0][0] if shapes[0] else 0, self.info.top_k
                if shapes != [[size, k], [size, k + 1], [rows], [rows], [rows]]:
                    raise _damaged(path, f"it has no {rows} rows of the {k} likeliest ids")
                ends = self._open[path].get_tensor("ends")
                rises = ends.dtype.kind in "iu" and np.all(np.diff(ends.astype(np.int64)) >= 0)
                if rows and not (rises and 0 <= ends[0] <= ends[-1] <= size):
                    raise _damaged(path, "its rows do not end where others begin")
            except (OSError, SafetensorError) as error:
                raise _damaged(path, str(error)) from error
        return self._open[path]


_COLUMNS = ("ids", "logs", "ends", "hashes", "checks")


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path} cannot be read: {reason}.\n  Delete it and what follows it, and make them again."
    )


class LogitWriter:
    """Writes a store row by row, or continues one."""

    def __init__(self, folder: Path, info: StoreInfo) -> None:
        """Raises ConfigError if `folder` holds other files, or a store with another `info`."""
        self.folder, self.info = folder, info
        if is_store(folder):
            stored = LogitStore(folder).info
            lines = "".join(f"    {line}\n" for line in info_differences(stored, info))
            if stored != info:
                raise ConfigError(
                    f"{folder} holds other probabilities. They differ in:\n{lines}"
                    "  Choose another --distil.store, or delete that one."
                )
        elif folder.exists() and (not folder.is_dir() or _named_files(folder)):
            raise ConfigError(
                f"{folder} holds other files.\n  Choose another --distil.store, or an empty one."
            )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_sealed(folder / FILE, {"version": VERSION, **asdict(info)})
        for rest in folder.glob(".tmp*"):  # safetensors' own, of a writer that was killed
            rest.unlink(missing_ok=True)
        parts = parts_in(folder)
        self.written = parts[-1][1] if parts else 0
        """Rows on disk."""
        self._pending: list[dict[str, np.ndarray]] = []

    def add(self, batch: Batch, logits: Float[Tensor, "B T V"]) -> None:
        """Append the next rows, with the teacher's logits for them. Raises DataError if a logit is
        not finite."""
        real = batch.targets != 0
        ids, logs = top_log_probs(logits[real], self.info.top_k, self.info.temperature)
        if not bool(logs[:, 0].isfinite().all()):
            raise DataError(
                f"The teacher's logits are not finite in {self.info.precision}.\n"
                "  Try --precision float32."
            )
        part = {
            "ids": ids.cpu().numpy().astype(self.info.id_type),
            "logs": logs.cpu().numpy().astype(self.info.dtype),
            "ends": real.sum(dim=1).cpu().numpy(),
            "hashes": row_hashes(batch),
        }
        ends = part["ends"].cumsum()
        part["checks"] = _checks(part["ids"], part["logs"], ends, part["hashes"])
        self._pending.append(part)
        if sum(len(part["hashes"]) for part in self._pending) >= PART_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write all rows so far to disk."""
        if not self._pending:
            return
        columns = {name: [part[name] for part in self._pending] for name in self._pending[0]}
        tensors = {name: np.concatenate(parts) for name, parts in columns.items()}
        tensors["ends"] = tensors["ends"].cumsum()
        stop = self.written + len(tensors["hashes"])
        path = self.folder / f"rows-{self.written:09d}-{stop:09d}.safetensors"
        try:
            with whole_file(path) as aside:
                save_file(tensors, aside)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{path} cannot be written: {error}.\n  Rows up to {self.written:,} are kept. Make "
                "room and repeat the command, which goes on after them."
            ) from error
        self.written, self._pending = stop, []


def _named_files(folder: Path) -> list[str]:
    """What lies in `folder` beside hidden files, which a killed writer may have left."""
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def top_log_probs(
    logits: Float[Tensor, "N V"], top_k: int, temperature: float
) -> tuple[Int[Tensor, "N k"], Float[Tensor, "N k1"]]:
    """The `top_k` most likely ids of each row, and their log-probabilities at this temperature; in
    the last column that of all other ids together, -inf if there are none."""
    scaled = logits.float() / temperature
    values, ids = scaled.topk(top_k, dim=-1)
    others = scaled.scatter(-1, ids, float("-inf")).logsumexp(dim=-1, keepdim=True)
    return ids, torch.cat([values, others], dim=-1) - scaled.logsumexp(dim=-1, keepdim=True)


def row_hashes(batch: Batch) -> np.ndarray:
    """A 64-bit hash of each row's inputs, targets and segments."""
    parts = [batch.inputs, batch.targets, batch.input_segments, batch.target_segments]
    columns = [part.cpu().numpy().astype("<i8") for part in parts if part is not None]
    widths = np.array([len(columns), *(column.shape[1] for column in columns)], "<i8").tobytes()
    rows = (widths + b"".join(map(np.ndarray.tobytes, row)) for row in zip(*columns, strict=True))
    digests = [blake2b(row, digest_size=8).digest() for row in rows]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def _checks(ids: np.ndarray, logs: np.ndarray, ends: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each row: of its ids and logs, which end at `ends`, of their types, and of
    its hash in `hashes`."""
    kinds = f"{ids.dtype} {ids.shape[1:]} {logs.dtype} {logs.shape[1:]}".encode()
    digests: list[bytes] = []
    begin = 0
    for end, name in zip(ends.tolist(), hashes, strict=True):
        row = kinds + ids[begin:end].tobytes() + logs[begin:end].tobytes() + name.tobytes()
        digests.append(blake2b(row, digest_size=8).digest())
        begin = end
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def is_store(folder: Path) -> bool:
    """Whether `folder` is a store, perhaps still without rows."""
    return (folder / FILE).is_file()


def parts_in(folder: Path) -> list[tuple[int, int, Path]]:
    """(first row, row after the last, file) of each part, up to the first gap."""
    parts: list[tuple[int, int, Path]] = []
    for path in sorted(folder.glob("rows-*.safetensors")):
        _, start, stop = path.stem.split("-")
        if int(start) != (parts[-1][1] if parts else 0):
            break
        parts.append((int(start), int(stop), path))
    return parts


def info_differences(stored: StoreInfo, here: StoreInfo) -> list[str]:
    """One line per differing value; data settings one by one."""
    differing = differences(stored, here)
    return [f"{name}: {there} there, {now} here" for name, (there, now) in differing.items()]
