"""Documents to a token store, one shard at a time."""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from switchworks.config import DataError
from switchworks.data.cache import atomic_write_json
from switchworks.data.tokens import store
from switchworks.data.tokens.tokenizer import Tokenizer

SECONDS_BETWEEN_LINES = 10.0

BATCH_CHARACTERS = 1 << 22
"""Characters tokenised at once: what a build holds in memory, whatever the corpus."""


class BuildProgress:
    """Prints every ten seconds the tokens so far, their rate, and of `total` characters (0: not
    known) the share done and the time left."""

    def __init__(self, label: str, total: int, *, quiet: bool = False) -> None:
        self.label, self.total, self.quiet = label, total, quiet
        self.characters = self.tokens = 0
        self._started = self._printed = time.monotonic()

    def advance(self, characters: int, tokens: int) -> None:
        """Count `characters` more as done, which gave `tokens` tokens."""
        self.characters += characters
        self.tokens += tokens
        now = time.monotonic()
        if self.quiet or now - self._printed < SECONDS_BETWEEN_LINES:
            return
        self._printed, seconds = now, now - self._started
        line = (
            f"{self.label}: {self.tokens / 1e6:.1f}M tokens, {self.tokens / seconds / 1e3:.0f}k/s"
        )
        if self.total and 0 < self.characters <= self.total:
            done = self.characters / self.total
            line += f", {100 * done:.0f} %, {seconds * (1 / done - 1):.0f} s left"
        print(line, flush=True)


def write_plan(folder: Path, tokenizer: Tokenizer, num_shards: int) -> None:
    """Begin a store of `num_shards` shards by `tokenizer` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in store.SPLITS:
        (folder / split).mkdir(exist_ok=True)
    values = {
        "version": store.STORE_VERSION,
        "num_shards": num_shards,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer),
    }
    atomic_write_json(folder / "plan.json", values)


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
    threads: int = 0,
    progress: BuildProgress | None = None,
) -> None:
    """Write `shard`, unless it is finished.

    `documents` yields (text, whether it is for validation). They are tokenised by `threads` threads
    of SentencePiece's own (0: one per core), at some tens of MB/s each, so no processes are needed.
    Raises DataError if the disk is full.
    """
    if store.finished_shard(folder, shard, num_shards) is not None:
        return
    threads = threads or os.cpu_count() or 1
    try:
        writer = _ShardWriter(folder, store.shard_name(shard, num_shards), token_dtype(tokenizer))
        with contextlib.closing(writer):
            for batch in _batches(documents):
                texts = [text for text, _ in batch]
                encoded = tokenizer.encode_batch(texts, sentinels=False, threads=threads)
                writer.add(encoded, [is_validation for _, is_validation in batch])
                if progress is not None:
                    progress.advance(sum(map(len, texts)), sum(map(len, encoded)))
            writer.commit()
    except OSError as error:
        raise DataError(
            f"The token store in {folder} cannot be written: {error.strerror}.\n"
            "  Make room, or set --data.cache to another disk."
        ) from error


def _batches(items: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Lists of items whose texts together have about BATCH_CHARACTERS characters."""
    batch: list[tuple[str, bool]] = []
    length = 0
    for item in items:
        batch.append(item)
        length += len(item[0])
        if length >= BATCH_CHARACTERS or len(batch) >= 1 << 14:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


class _ShardWriter:
    """The four files of a shard under temporary names; `commit` renames them and writes the .json
    that makes the shard count."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self.folder, self.name, self.dtype = folder, name, dtype
        self._counts = {split: [0, 0] for split in store.SPLITS}  # tokens, documents
        self._files = {
            name: (folder / f"{name}.tmp").open("wb")
            for split in store.SPLITS
            for name in (f"{split}/{self.name}.tokens", f"{split}/{self.name}.ends")
        }

    def add(self, documents: list[np.ndarray], is_validation: list[bool]) -> None:
        """Append tokenised documents, each to its split; those without tokens are left out."""
        for index, split in enumerate(store.SPLITS):  # False, to train on, is 0
            pairs = zip(documents, is_validation, strict=True)
            kept = [tokens for tokens, held_out in pairs if held_out == index and len(tokens)]
            if not kept:
                continue
            count = self._counts[split]
            ends = count[0] + np.cumsum([len(tokens) for tokens in kept])
            tokens = np.concatenate(kept).astype(self.dtype)
            self._files[f"{split}/{self.name}.tokens"].write(tokens.tobytes())
            self._files[f"{split}/{self.name}.ends"].write(ends.astype("<u8").tobytes())
            count[0], count[1] = int(ends[-1]), count[1] + len(kept)

    def commit(self) -> None:
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            (self.folder / f"{name}.tmp").replace(self.folder / name)
        sizes = {name: (self.folder / name).stat().st_size for name in self._files}
        hashes = {name: store.file_hash(self.folder / name) for name in self._files}
        segments = {
            split: store.Segment(f"{split}/{self.name}", *self._counts[split])
            for split in store.SPLITS
        }
        shard = store.Shard(segments, hashes, sizes)
        atomic_write_json(self.folder / f"{self.name}.json", asdict(shard))

    def close(self) -> None:
        """Remove what was not committed."""
        for name, file in self._files.items():
            with contextlib.suppress(OSError):  # a full disk is reported once
                file.close()
            (self.folder / f"{name}.tmp").unlink(missing_ok=True)
