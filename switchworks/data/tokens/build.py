"""Documents to a token store: one shard at a time, part by part, able to go on after a kill."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from types import TracebackType

import numpy as np

from switchworks.config import DataError
from switchworks.data.progress import Progress
from switchworks.data.sources.files import Report
from switchworks.data.tokens.store import (
    SPLITS,
    VERSION,
    Part,
    Segment,
    finished_parts,
    part_name,
    write_json,
)
from switchworks.data.tokens.tokenizer import Tokenizer

PART_TOKENS = 1 << 26
"""A part is closed by the first document that takes it past this many tokens: 128 MiB, some tens
of seconds of work that a kill can cost."""

BATCH_CHARACTERS = 1 << 22
"""Characters tokenised at once: what a build holds in memory, whatever the corpus."""


def write_plan(folder: Path, tokenizer: Tokenizer, num_shards: int) -> None:
    """`folder` is a store, complete or not, of `num_shards` shards by `tokenizer`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        (folder / split).mkdir(exist_ok=True)
    values = {
        "version": VERSION,
        "num_shards": num_shards,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer),
    }
    write_json(folder / "plan.json", values)


def token_dtype(tokenizer: Tokenizer) -> str:
    """The smallest unsigned type that holds every id, little-endian as stored."""
    return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"


def build_shard(
    folder: Path,
    documents: Iterable[tuple[str, bool]],
    tokenizer: Tokenizer,
    *,
    shard: int = 0,
    num_shards: int = 1,
    report: Report | None = None,
    threads: int = 0,
    progress: Progress | None = None,
    part_tokens: int = PART_TOKENS,
) -> None:
    """Every part of `shard` is written; parts that were there already are not made again.

    `documents` yields (text, held out) pairs, the same in the same order at every call. They are
    tokenised by `threads` threads of SentencePiece's own (0: one per core), at some tens of MB/s
    each, so no processes are needed. Raises DataError if the disk is full.
    """
    done = finished_parts(folder, shard, num_shards)
    if done and done[-1].last:
        return
    items = islice(documents, sum(part.documents_read for part in done), None)
    batches = _batches(items)
    number, last = len(done), False
    try:
        while not last:
            name = part_name(shard, num_shards, number)
            with _PartWriter(folder, name, token_dtype(tokenizer)) as writer:
                last = _fill(writer, batches, tokenizer, threads, progress, part_tokens)
                counts = asdict(report) if report is not None else {}
                writer.commit(shard, number, last, counts)
            number += 1
    except OSError as error:
        raise DataError(
            f"The token store in {folder} cannot be written: {error.strerror}.\n"
            "  Make room, or set --data.cache to another disk; finished parts are kept."
        ) from error


def _fill(
    writer: "_PartWriter",
    batches: Iterator[list[tuple[str, bool]]],
    tokenizer: Tokenizer,
    threads: int,
    progress: Progress | None,
    part_tokens: int,
) -> bool:
    """Documents are in `writer` until the part is full. True if there are no more."""
    for batch in batches:
        texts = [text for text, _ in batch]
        encoded = tokenizer.encode_batch(
            texts, sentinels=False, threads=threads or os.cpu_count() or 1
        )
        for held_out, split in enumerate(SPLITS):
            ids = [e for e, (_, held) in zip(encoded, batch, strict=True) if held == held_out]
            writer.add(split, [tokens for tokens in ids if len(tokens)])
        writer.documents_read += len(batch)
        if progress is not None:
            progress.advance(sum(map(len, texts)), sum(map(len, encoded)))
        if writer.num_tokens >= part_tokens:
            return False
    return True


def _batches(items: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Lists of items whose texts together have about BATCH_CHARACTERS characters."""
    batch: list[tuple[str, bool]] = []
    length = 0
    for text, held_out in items:
        batch.append((text, held_out))
        length += len(text)
        if length >= BATCH_CHARACTERS or len(batch) >= 1 << 14:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


class _PartWriter:
    """The four files of a part, written aside; `commit` makes them count."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self.folder, self.name, self.dtype = folder, name, dtype
        self.documents_read = 0
        self._counts = {split: [0, 0] for split in SPLITS}  # tokens, documents
        self._files = {
            f"{split}/{name}.{kind}": _File(folder / split / f"{name}.{kind}")
            for split in SPLITS
            for kind in ("tokens", "ends")
        }

    def __enter__(self) -> "_PartWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.abandon()

    @property
    def num_tokens(self) -> int:
        return sum(tokens for tokens, _ in self._counts.values())

    def add(self, split: str, documents: list[np.ndarray]) -> None:
        """`documents` follow those already in `split`."""
        if not documents:
            return
        count = self._counts[split]
        ends = count[0] + np.cumsum([len(tokens) for tokens in documents])
        self._files[f"{split}/{self.name}.tokens"].write(np.concatenate(documents), self.dtype)
        self._files[f"{split}/{self.name}.ends"].write(ends, "<u8")
        count[0], count[1] = int(ends[-1]), count[1] + len(documents)

    def commit(self, shard: int, number: int, last: bool, report: dict) -> None:
        sizes = {name: file.size for name, file in self._files.items()}
        hashes = {name: file.keep() for name, file in self._files.items()}
        segments = {
            split: Segment(f"{split}/{self.name}", *self._counts[split]) for split in SPLITS
        }
        part = Part(shard, number, self.documents_read, last, segments, hashes, sizes, report)
        write_json(self.folder / f"{self.name}.json", asdict(part))


class _File:
    """A file that has its name only once it is whole; its hash is taken while writing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.aside = path.with_name(path.name + ".tmp")
        self.file = self.aside.open("wb")
        self.hash = blake2b(digest_size=16)
        self.size = 0

    def write(self, values: np.ndarray, dtype: str) -> None:
        data = values.astype(dtype).tobytes()
        self.file.write(data)
        self.hash.update(data)
        self.size += len(data)

    def keep(self) -> str:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.aside.replace(self.path)
        return self.hash.hexdigest()

    def abandon(self) -> None:
        if not self.file.closed:
            with contextlib.suppress(OSError):  # a full disk is reported once
                self.file.close()
            self.aside.unlink(missing_ok=True)
