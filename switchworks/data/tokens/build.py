"""Documents to a token store: one shard at a time, part by part, resumable after a kill."""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np

from switchworks.config import DataError
from switchworks.data.tokens import store
from switchworks.data.tokens.tokenizer import SentencePieceTokenizer, Tokenizer
from switchworks.disk import write_sealed
from switchworks.progress import Phase

PART_TOKENS = 1 << 26
"""A part is closed by the first batch of documents that takes it past this many tokens: 128 MiB,
some tens of seconds of work, which is what a kill can cost."""

BATCH_CHARACTERS = 1 << 22
"""Characters tokenised at once: what a build holds in memory, whatever the corpus."""


def write_plan(folder: Path, tokenizer: Tokenizer, num_shards: int, **about: str) -> None:
    """Begin a store of `num_shards` shards by `tokenizer` in `folder`; `about` is kept with it."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in store.SPLITS:
        (folder / split).mkdir(exist_ok=True)
    values = {
        "version": store.STORE_VERSION,
        "num_shards": num_shards,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer),
        **about,
    }
    write_sealed(folder / "plan.json", values)


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
    progress: Phase | None = None,
    part_tokens: int = PART_TOKENS,
) -> None:
    """Write the parts of `shard` that are still missing.

    `documents` yields (text, whether it is for validation), the same in the same order at every
    call. They are tokenised by `threads` threads of SentencePiece's own (0: one per core), at some
    tens of MB/s each, so no processes are needed. Raises DataError if the disk is full.
    """
    done = store.finished_parts(folder, shard, num_shards)
    if done and done[-1].last:
        return
    # Resume: finished parts say how many documents they took, and as many are skipped here. A part
    # without its .json is written again, over whatever a killed process left of its files.
    items = islice(documents, sum(part.documents_read for part in done), None)
    batches = _batches(items)
    number, last = len(done), False
    try:
        while not last:
            name = store.part_name(shard, num_shards, number)
            writer = _PartWriter(folder, name, token_dtype(tokenizer))
            with contextlib.closing(writer):
                last = _fill_part(writer, batches, tokenizer, threads, progress, part_tokens)
                writer.commit(shard, number, last)
            number += 1
    except OSError as error:
        raise DataError(
            f"The token store in {folder} cannot be written: {error.strerror}.\n"
            "  Make room, or set --data.cache to another disk; finished parts are kept."
        ) from error


def _fill_part(
    writer: "_PartWriter",
    batches: Iterator[list[tuple[str, bool]]],
    tokenizer: Tokenizer,
    threads: int,
    progress: Phase | None,
    part_tokens: int,
) -> bool:
    """Tokenise documents into `writer` until the part is full; True if there are no more."""
    for batch in batches:
        texts = [text for text, _ in batch]
        encoded = tokenizer.encode_batch(
            texts, sentinels=False, threads=threads or os.cpu_count() or 1
        )
        for index, split in enumerate(store.SPLITS):  # False, to train on, is 0
            pairs = zip(encoded, batch, strict=True)
            ids = [tokens for tokens, (_, is_validation) in pairs if is_validation == index]
            writer.add(split, [tokens for tokens in ids if len(tokens)])
        if isinstance(tokenizer, SentencePieceTokenizer):
            writer.space_marks += sum(text.count("\u2581") for text in texts)
        writer.documents_read += len(batch)
        if progress is not None:
            progress.advance(sum(map(len, texts)))
            progress.say(f"{writer.num_tokens / 1e6:.1f}M tokens")
        if writer.num_tokens >= part_tokens:
            return False
    return True


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


class _PartWriter:
    """The four files of a part under temporary names; `commit` renames them and writes the .json
    that makes the part count."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self.folder, self.name, self.dtype = folder, name, dtype
        self.documents_read = self.space_marks = 0
        self._counts = {split: [0, 0] for split in store.SPLITS}  # tokens, documents
        self._files = {
            name: (folder / f"{name}.tmp").open("wb")
            for split in store.SPLITS
            for name in (f"{split}/{self.name}.tokens", f"{split}/{self.name}.ends")
        }

    @property
    def num_tokens(self) -> int:
        return sum(tokens for tokens, _ in self._counts.values())

    def add(self, split: str, documents: list[np.ndarray]) -> None:
        """Append `documents` to those already in `split`."""
        if not documents:
            return
        count = self._counts[split]
        ends = count[0] + np.cumsum([len(tokens) for tokens in documents])
        tokens = np.concatenate(documents).astype(self.dtype)
        self._files[f"{split}/{self.name}.tokens"].write(tokens.tobytes())
        self._files[f"{split}/{self.name}.ends"].write(ends.astype("<u8").tobytes())
        count[0], count[1] = int(ends[-1]), count[1] + len(documents)

    def commit(self, shard: int, number: int, last: bool) -> None:
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
        part = store.ShardPart(shard, number, self.documents_read, last, segments, hashes, sizes)
        write_sealed(self.folder / f"{self.name}.json", asdict(part))
        if self.space_marks:
            logging.getLogger(__name__).warning(
                "%d characters U+2581 of the text became spaces, for which SentencePiece has them",
                self.space_marks,
            )

    def close(self) -> None:
        """Remove what was not committed."""
        for name, file in self._files.items():
            with contextlib.suppress(OSError):  # a full disk is reported once
                file.close()
            (self.folder / f"{name}.tmp").unlink(missing_ok=True)
