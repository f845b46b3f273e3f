"""From the data settings to a tokenizer and token stores, made when missing.

They lie in the cache under names made of the fingerprints of text, tokenizer and validation share,
so no change of one meets an old store. One process builds, others wait.
"""

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain
from pathlib import Path

from switchworks.config import DataError
from switchworks.data.cache import digest, file_lock
from switchworks.data.config import DataConfig, cache_folder
from switchworks.data.sources import open_source
from switchworks.data.sources.near_copies import copied, key_of
from switchworks.data.sources.text_source import SPLIT_RULES, TextConfig, TextSource, is_validation
from switchworks.data.tokens import store
from switchworks.data.tokens.build import build_shard, write_plan
from switchworks.data.tokens.store import TokenStore
from switchworks.data.tokens.tokenizer import Tokenizer, load_tokenizer
from switchworks.data.tokens.train import needed_sentinels, sample_order, trained_tokenizer
from switchworks.disk import read_sealed
from switchworks.progress import phase

VERIFIED_BYTES = 1 << 28
"""A store up to this size (256 MiB: a third of a second) is read and its hashes are compared
whenever it is opened; of a larger one only the lengths of the files are."""


@dataclass(frozen=True)
class PreparedCorpus:
    """A tokenizer and the tokens it made."""

    tokenizer: Tokenizer
    folder: Path

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
        return store.open_store(self.folder, verify=size <= VERIFIED_BYTES)

    @property
    def missing(self) -> list[int]:
        """The shards that no job has finished yet."""
        return store.missing_shards(self.folder)

    def __str__(self) -> str:
        head = f"{self.tokenizer.size} ids, tokens in {self.folder}"
        if missing := self.missing:
            return f"{head}; shards still missing: {', '.join(map(str, missing))}"
        lines = [
            f"{part.split:<11} {part.num_tokens:>14,} tokens in {part.num_documents:,} documents"
            for part in (self.train, self.validation)
        ]
        return "\n".join([head, *lines])


def prepare(
    config: DataConfig, *, vocab_size: int, shard: tuple[int, int] | None = None, name: str = ""
) -> PreparedCorpus:
    """The tokenizer and the stores of one corpus; what is missing is made, the rest is opened.

    For a mixture of several use `open_dataset`. Progress is printed under `name`.
    `vocab_size` is the size of a tokenizer trained here, sentinels included. `shard` = (i, n)
    builds the i-th of n shards only, so that n jobs can share the work; the first of them to
    start trains the tokenizer while the others wait for it. Raises DataError for bad input.
    """
    about = {"text": name or config.named, "settings": _settings_key(config, vocab_size)}
    try:
        source = open_source(config, cache_folder(config))
    except DataError as error:
        if shard is None and (kept := _kept_corpus(config, about["settings"])):
            logging.getLogger(__name__).warning("%s\n  Its tokens in the cache are read.", error)
            return kept
        raise
    path = config.tokenizer
    if path == "train":
        texts = sample_order(source)
        path = trained_tokenizer(config, source.fingerprint(), texts, vocab_size)
    tokenizer = load_tokenizer(path)
    folder = cache_folder(config) / f"store-{_store_key(config, source, tokenizer)}"
    if not (folder / "store.json").exists():
        num_shards = _plan(folder, tokenizer, shard, about)
        characters = (source.num_characters or 0) // num_shards
        for index in range(num_shards) if shard is None else [shard[0]]:
            part = "" if num_shards == 1 else f"{index}/{num_shards}"
            label = " ".join(filter(None, ["tokenising", name, part]))
            shard_lock = file_lock(folder / f"shard-{index}")
            with shard_lock, phase(label, characters) as shown:  # it may have been made by then
                build_shard(
                    folder,
                    _documents(config, source, index, num_shards),
                    tokenizer,
                    shard=index,
                    num_shards=num_shards,
                    threads=config.workers,
                    progress=shown,
                )
        with file_lock(folder):
            if not store.missing_shards(folder):
                store.finish_store(folder, validation_share=config.validation_share)
    return PreparedCorpus(tokenizer, folder)


def _plan(
    folder: Path, tokenizer: Tokenizer, shard: tuple[int, int] | None, about: dict[str, str]
) -> int:
    """How many shards the store has: decided by the first process, and fixed from then on."""
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise DataError(
            f"There is no shard {shard[0]} of {shard[1]}.\n"
            f"  Shards count from 0: use --shard 0/{shard[1]} to {shard[1] - 1}/{shard[1]}."
        )
    with file_lock(folder):
        if not (folder / "plan.json").exists():
            write_plan(folder, tokenizer, 1 if shard is None else shard[1], **about)
        num_shards = store.planned_shards(folder)
    if shard is not None and shard[1] != num_shards:
        raise DataError(
            f"The store in {folder} was begun in {num_shards} shards, not {shard[1]}.\n"
            f"  Use --shard i/{num_shards}, or delete the folder to begin again."
        )
    return num_shards


def _settings_key(config: DataConfig, vocab_size: int) -> str:
    """Hexadecimal; of all settings that say which text is read and how it becomes tokens."""
    text = {field.name: getattr(config, field.name) for field in fields(TextConfig)}
    tokens = config.tokenizer, vocab_size, config.character_coverage, needed_sentinels(config)
    return digest(text | {"workers": 0}, tokens)


def _kept_corpus(config: DataConfig, settings: str) -> PreparedCorpus | None:
    """The newest tokens in the cache that were made by these settings, for text that is gone."""
    cache, places = cache_folder(config), dict[str, Path | str]()
    for made in cache.glob("tokenizer-*/made.json"):
        with suppress(DataError):  # a damaged one is none
            places[read_sealed(made).get("fingerprint", "")] = made.parent
    for plan in sorted(cache.glob("store-*/plan.json"), key=lambda path: -path.stat().st_mtime):
        with suppress(DataError):
            values = read_sealed(plan)
            is_trained = config.tokenizer == "train"
            place = places.get(values["tokenizer"]) if is_trained else config.tokenizer
            is_whole = (plan.parent / "store.json").exists()
            if place is not None and is_whole and values.get("settings") == settings:
                return PreparedCorpus(load_tokenizer(place), plan.parent)
    return None


def _documents(
    config: DataConfig, source: TextSource, shard: int, num_shards: int
) -> Iterator[tuple[str, bool]]:
    """(text, whether it is for validation) of each document: chosen by their hash unless the source
    has a validation split."""
    dropped: set[bytes] = set()
    if config.near_copies != "keep":
        copies = _near_copies(config, source)
        dropped = copies if config.near_copies == "drop" else dropped
    for text, held_out in _split(config, source, shard, num_shards):
        if not (held_out and dropped and key_of(text) in dropped):
            yield text, held_out


def _split(
    config: DataConfig, source: TextSource, shard: int = 0, num_shards: int = 1
) -> Iterator[tuple[str, bool]]:
    documents = source.documents(shard, num_shards)
    validation = source.validation()
    if validation is None:
        return ((text, is_validation(text, config.validation_share)) for text in documents)
    more = validation.documents(shard, num_shards)
    return chain(((text, False) for text in documents), ((text, True) for text in more))


def _near_copies(config: DataConfig, source: TextSource) -> set[bytes]:
    """The keys of held-out documents with a near copy among those trained on; printed is how many
    there are."""
    held_out = [text for text, is_held_out in _split(config, source) if is_held_out]
    rest = (text for text, is_held_out in _split(config, source) if not is_held_out)
    copies = copied(held_out, rest)
    end = "are left out" if config.near_copies == "drop" else "--data.near-copies drop drops them"
    print(
        f"{len(copies):,} of {len(held_out):,} validation documents have near copies among those "
        f"trained on; {end}"
    )
    return copies


def _store_key(config: DataConfig, source: TextSource, tokenizer: Tokenizer) -> str:
    validation = source.validation()
    by_hash = SPLIT_RULES, config.validation_share
    return digest(
        store.STORE_VERSION,
        source.fingerprint(),
        by_hash if validation is None else validation.fingerprint(),
        config.near_copies == "drop",
        tokenizer.fingerprint,
    )[:16]
