"""From the data settings to a tokenizer and token stores, made when missing.

Everything lies in the cache folder under names made of fingerprints: of the text's source, then
of the tokenizer. So a second call only opens what the first one made, and a change of the text,
the tokenizer or the validation share never meets an old store. One process builds, others wait.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

from switchworks.config import DataError
from switchworks.data.cache import digest, file_lock
from switchworks.data.config import DataConfig
from switchworks.data.progress import BuildProgress
from switchworks.data.sources import open_source
from switchworks.data.sources.text_source import Report, TextSource, is_validation
from switchworks.data.tokens.build import build_shard, write_plan
from switchworks.data.tokens.store import (
    TokenStore,
    finish_store,
    missing_shards,
    open_store,
    planned_shards,
)
from switchworks.data.tokens.tokenizer import Tokenizer, load_tokenizer
from switchworks.data.tokens.train import sample_order, trained_tokenizer

VERIFIED_BYTES = 1 << 28
"""A store up to this size (256 MiB: a third of a second) is read and its hashes are compared
whenever it is opened; of a larger one only the lengths of the files are."""


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
        size = sum(file.stat().st_size for file in self.folder.glob("*/*.tokens"))
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
        return "\n".join(
            [head]
            + [
                f"{store.split:<11} {store.num_tokens:>14,} tokens in {store.num_documents:,} "
                "documents"
                for store in (self.train, self.validation)
            ]
        )


def prepare(
    config: DataConfig,
    *,
    vocab_size: int,
    shard: tuple[int, int] | None = None,
    quiet: bool = False,
    name: str = "",
) -> PreparedCorpus:
    """The tokenizer and the stores of one corpus; what is missing is made, the rest is opened.

    For a mixture of several use `open_dataset`. Progress is printed under `name` unless `quiet`.
    `vocab_size` is the size of a tokenizer trained here, sentinels included. `shard` = (i, n)
    builds the i-th of n shards only, so that n jobs can share the work; the first of them to
    start trains the tokenizer while the others wait for it. Raises DataError for bad input.
    """
    assert not config.mixture
    cache = cache_folder(config)
    source = open_source(config, cache)
    tokenizer = load_tokenizer(
        config.tokenizer
        if config.tokenizer != "train"
        else trained_tokenizer(
            cache,
            source.fingerprint(),
            sample_order(source),
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
        with file_lock(folder):
            if not missing_shards(folder):
                finish_store(folder, validation_share=config.validation_share)
        report.log()
    return PreparedCorpus(tokenizer, folder, report)


def cache_folder(config: DataConfig) -> Path:
    """`config.cache`, else $SWITCHWORKS_CACHE, else ~/.cache/switchworks."""
    folder = config.cache or os.environ.get("SWITCHWORKS_CACHE") or "~/.cache/switchworks"
    return Path(folder).expanduser()


def _plan(folder: Path, tokenizer: Tokenizer, shard: tuple[int, int] | None) -> int:
    """How many shards the store has: decided by the first process, and fixed from then on."""
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise DataError(
            f"There is no shard {shard[0]} of {shard[1]}.\n"
            f"  Shards count from 0: use --shard 0/{shard[1]} to {shard[1] - 1}/{shard[1]}."
        )
    with file_lock(folder):
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
    source: TextSource,
    tokenizer: Tokenizer,
    shard: int,
    num_shards: int,
    quiet: bool,
    name: str,
) -> Report:
    """Finish one shard, unless another process has by the time the lock is free."""
    report = Report()
    label = f"tokenising {name}".strip() + ("" if num_shards == 1 else f" {shard}/{num_shards}")
    total = source.num_characters
    total = None if total is None else total // num_shards
    with file_lock(folder / f"shard-{shard}"):
        build_shard(
            folder,
            _with_split(config, source, shard, num_shards, report),
            tokenizer,
            shard=shard,
            num_shards=num_shards,
            report=report,
            threads=config.workers,
            progress=BuildProgress(label, total, quiet=quiet),
        )
    return report


def _with_split(
    config: DataConfig, source: TextSource, shard: int, num_shards: int, report: Report
) -> Iterator[tuple[str, bool]]:
    """(text, whether it is for validation) of each document, counted in `report`.

    Validation documents are chosen by their hash unless the source has a validation split.
    """
    documents = source.documents(shard, num_shards, report=report)
    validation = source.validation()
    if validation is None:
        pairs = ((text, is_validation(text, config.validation_share)) for text in documents)
    else:
        more = validation.documents(shard, num_shards, report=report)
        pairs = chain(((text, False) for text in documents), ((text, True) for text in more))
    for text, is_held_out in pairs:
        report.documents += 1
        report.characters += len(text)
        yield text, is_held_out


def _store_key(config: DataConfig, source: TextSource, tokenizer: Tokenizer) -> str:
    validation = source.validation()
    return digest(
        source.fingerprint(),
        config.validation_share if validation is None else validation.fingerprint(),
        tokenizer.fingerprint,
    )[:16]
