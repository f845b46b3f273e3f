"""From the data settings to a tokenizer and token stores, made when missing.

Everything lies in the cache folder under names made of fingerprints: of the text's source, then
of the tokenizer. So a second call only opens what the first one made, and a change of the text,
the tokenizer or the held-out share never meets an old store. One process builds, others wait.
"""

import heapq
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import chain
from pathlib import Path

from filelock import FileLock, Timeout

from switchworks.config import DataError
from switchworks.data.config import DataConfig
from switchworks.data.progress import Progress
from switchworks.data.sources.documents import Documents, is_validation, open_documents
from switchworks.data.sources.files import Report
from switchworks.data.tokens.build import build_shard, write_plan
from switchworks.data.tokens.store import (
    TokenStore,
    finish_store,
    missing_shards,
    open_store,
    planned_shards,
)
from switchworks.data.tokens.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

VERIFIED_BYTES = 1 << 28
"""A store up to this size (256 MiB: a third of a second) is read and its hashes are compared
whenever it is opened; of a larger one only the lengths of the files are."""

SAMPLED_FILES = 32
"""A tokenizer is trained on the beginnings of this many files, spread evenly over the source."""


@dataclass(frozen=True)
class PreparedCorpus:
    """A tokenizer and the tokens it made. `report` counts what this call read, if it built."""

    tokenizer: Tokenizer
    folder: Path
    report: Report

    @cached_property
    def train(self) -> TokenStore:
        """Raises DataError, naming them, while other shards are missing."""
        return self._stores[0]

    @cached_property
    def validation(self) -> TokenStore:
        return self._stores[1]

    @cached_property
    def _stores(self) -> tuple[TokenStore, TokenStore]:
        size = sum(f.stat().st_size for f in self.folder.glob("*/*.tokens"))
        return open_store(
            self.folder, tokenizer=self.tokenizer.fingerprint, verify=size <= VERIFIED_BYTES
        )

    @property
    def missing(self) -> list[int]:
        """The shards that no job has finished yet."""
        return missing_shards(self.folder)

    def __str__(self) -> str:
        head = f"{self.tokenizer.size} ids, tokens in {self.folder}"
        if missing := self.missing:
            return f"{head}; shards still missing: {', '.join(map(str, missing))}"
        return (
            f"{head}\n"
            f"train       {self.train.num_tokens:>14,} tokens in {self.train.num_documents:,} "
            f"documents\n"
            f"validation  {self.validation.num_tokens:>14,} tokens in "
            f"{self.validation.num_documents:,} documents"
        )


def prepare(
    config: DataConfig,
    *,
    vocab_size: int,
    shard: tuple[int, int] | None = None,
    quiet: bool = False,
    name: str = "",
) -> PreparedCorpus:
    """The tokenizer and the stores for `config`; what is missing is made, the rest is opened.

    The text is that of one corpus, to which progress refers by `name`; a mixture of several is
    for `corpora.open_dataset`.
    `vocab_size` is the size of a tokenizer trained here, sentinels included. `shard` = (i, n)
    builds the i-th of n shards only, so that n jobs can share the work; the first of them to
    come trains the tokenizer while the others wait for it. Raises DataError for bad input.
    """
    assert not config.mixture
    cache = cache_folder(config)
    source = open_documents(config, cache)
    tokenizer = load_tokenizer(
        config.tokenizer
        if config.tokenizer != "train"
        else trained_tokenizer(
            cache,
            source.fingerprint(),
            spread(source),
            vocab_size,
            quiet,
            coverage=config.character_coverage,
        )
    )
    folder = cache / f"store-{_store_key(config, source, tokenizer)}"
    report = Report()
    if not (folder / "store.json").exists():
        num_shards = _plan(folder, tokenizer, shard)
        for index in range(num_shards) if shard is None else [shard[0]]:
            report.merge(_build(folder, config, source, tokenizer, index, num_shards, quiet, name))
        with _lock(folder):
            if not missing_shards(folder):
                finish_store(folder, validation_share=config.validation_share)
        report.log()
    return PreparedCorpus(tokenizer, folder, report)


def cache_folder(config: DataConfig) -> Path:
    """`config.cache`, else $SWITCHWORKS_CACHE, else ~/.cache/switchworks."""
    named = config.cache or os.environ.get("SWITCHWORKS_CACHE") or "~/.cache/switchworks"
    return Path(named).expanduser()


def trained_tokenizer(
    cache: Path,
    fingerprint: str,
    documents: Iterable[str],
    vocab_size: int,
    quiet: bool,
    *,
    coverage: float,
) -> Path:
    """The folder of a tokenizer of `vocab_size` ids, trained if the cache has none.

    `fingerprint` names the text that `documents`, read only for training, gives.
    """
    folder = cache / f"tokenizer-{_key(fingerprint, vocab_size, coverage)}"
    if not folder.is_dir():
        with _lock(folder):
            if not folder.is_dir():
                if not quiet:
                    print(f"training a tokenizer of {vocab_size} ids", flush=True)
                made = train_sentencepiece(documents, vocab_size, coverage=coverage)
                aside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
                made.save(aside)
                aside.replace(folder)
    return folder


def spread(source: Documents) -> Iterator[str]:
    """The documents of the source, taken in turn from files spread evenly over it.

    A function of the source alone, so that every machine trains on the same text.
    """
    ways = min(source.num_files, SAMPLED_FILES)
    streams = [enumerate(source.documents(way, ways)) for way in range(ways)]
    keyed = (((place, way, text) for place, text in stream) for way, stream in enumerate(streams))
    return (text for _, _, text in heapq.merge(*keyed))


def _plan(folder: Path, tokenizer: Tokenizer, shard: tuple[int, int] | None) -> int:
    """How many shards the store has. The first to ask decides."""
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise DataError(
            f"There is no shard {shard[0]} of {shard[1]}.\n"
            f"  Shards count from 0: use --shard 0/{shard[1]} to {shard[1] - 1}/{shard[1]}."
        )
    with _lock(folder):
        if not (folder / "plan.json").exists():
            write_plan(folder, tokenizer, 1 if shard is None else shard[1])
        num_shards = planned_shards(folder)
    if shard is not None and shard[1] != num_shards:
        raise DataError(
            f"The store in {folder} was begun in {num_shards} shards, not {shard[1]}.\n"
            f"  Use --shard i/{num_shards}, or delete the folder to begin again."
        )
    return num_shards


def _build(
    folder: Path,
    config: DataConfig,
    source: Documents,
    tokenizer: Tokenizer,
    shard: int,
    num_shards: int,
    quiet: bool,
    name: str,
) -> Report:
    """One shard is finished, by this process or, if that came first, by another."""
    report = Report()
    what = f"tokenising {name}".strip() + ("" if num_shards == 1 else f" {shard}/{num_shards}")
    total = source.num_characters
    total = None if total is None else total // num_shards
    with _lock(folder / f"shard-{shard}"), Progress(what, total, quiet=quiet) as progress:
        build_shard(
            folder,
            _split(config, source, shard, num_shards, report),
            tokenizer,
            shard=shard,
            num_shards=num_shards,
            report=report,
            threads=config.workers,
            progress=progress,
        )
    return report


def _split(
    config: DataConfig, source: Documents, shard: int, num_shards: int, report: Report
) -> Iterator[tuple[str, bool]]:
    """Documents, each with whether it is held out: by its hash, or by the source itself."""
    documents = source.documents(shard, num_shards, report=report)
    held_out = source.held_out()
    if held_out is None:
        return ((text, is_validation(text, config.validation_share)) for text in documents)
    more = held_out.documents(shard, num_shards, report=report)
    return chain(((text, False) for text in documents), ((text, True) for text in more))


def _store_key(config: DataConfig, source: Documents, tokenizer: Tokenizer) -> str:
    held_out = source.held_out()
    return _key(
        source.fingerprint(),
        config.validation_share if held_out is None else held_out.fingerprint(),
        tokenizer.fingerprint,
    )


def _key(*values: object) -> str:
    return blake2b(repr(values).encode(), digest_size=8).hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time, and let go of when it dies. Says so before it waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(path.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logging.getLogger(__name__).warning("waiting for the process that is making %s", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
