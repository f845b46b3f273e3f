"""All that a run reads: one corpus or a mixture, from the settings to batches.

The callers need not know which. One corpus is a mixture of one, without a name, whose batches
are those of a plain `Pipeline`.
"""

import heapq
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from switchworks.batch import Batch
from switchworks.config import DataError
from switchworks.data.config import DataConfig
from switchworks.data.rows.mixture import Mixture, naming, rates
from switchworks.data.rows.pipeline import Pipeline, validation_batches
from switchworks.data.sources.documents import Documents, open_documents
from switchworks.data.sources.per_language import languages_of, names_languages, unusable
from switchworks.data.tokens.coverage import (
    Coverage,
    byte_lengths,
    measure_coverage,
    tokens_and_bytes,
)
from switchworks.data.tokens.prepare import (
    PreparedCorpus,
    cache_folder,
    prepare,
    spread,
    trained_tokenizer,
)
from switchworks.data.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class ValidationSet:
    """Held-out batches of each corpus by its name, and the share each loss has in the mean."""

    batches: Mapping[str, list[Batch]]
    shares: Mapping[str, float]
    sizes: Mapping[str, tuple[float, float]]
    """Target tokens, sentinels and EOS among them, and UTF-8 bytes of the text they hide."""

    def bits_per_byte(self, name: str, nats: float) -> float:
        """What `nats` per target token of a corpus come to."""
        tokens, size = self.sizes[name]
        return nats * tokens / max(1.0, size) / math.log(2)


@dataclass(frozen=True)
class TextDataset:
    """One tokenizer, and the tokens of each corpus by its name; "" names one that is alone."""

    config: DataConfig
    tokenizer: Tokenizer
    parts: Mapping[str, PreparedCorpus]
    sources: Mapping[str, Documents] = field(default_factory=dict)
    """Where the text of a mixture's corpora comes from."""

    @property
    def complete(self) -> bool:
        """Whether no shard of any corpus is missing."""
        return not any(part.missing for part in self.parts.values())

    @property
    def by_language(self) -> bool:
        """Whether there is a corpus for each language, by its code."""
        return self.config.is_mixture and not self.config.mixture and not self.config.tasks

    @property
    def train_tokens(self) -> int:
        """Of all corpora together."""
        return sum(part.train.num_tokens for part in self.parts.values())

    @property
    def digest(self) -> str:
        """Hexadecimal; of the tokenizer, and of all tokens of both sides in their order.

        Equal wherever the same text was made the same tokens, whatever its files are called.
        """
        stores = {
            name: [None if one is None else one.digest for one in (part.train, part.validation)]
            for name, part in self.parts.items()
        }
        named = json.dumps([self.tokenizer.fingerprint, stores])
        return blake2b(named.encode(), digest_size=16).hexdigest()

    def other_than(self, noted: Mapping[str, Any]) -> str | None:
        """How this text differs from that of the run whose about.json is `noted`; None: it is it.

        Older runs noted no more than the number of tokens.
        """
        same = (
            noted["text_digest"] == self.digest
            if "text_digest" in noted
            else noted.get("train_tokens") in (None, self.train_tokens)
        )
        if same:
            return None
        if noted["train_tokens"] == self.train_tokens:
            return "other tokens, though as many"
        lost = [name for name in noted.get("corpora", {}) if name not in self.parts]
        return f"{noted['train_tokens']:,} tokens there, {self.train_tokens:,} here" + (
            f", where {', '.join(lost)} are missing" if lost else ""
        )

    @property
    def rates(self) -> dict[str, float]:
        """The share of the rows that each corpus gives."""
        by, stores = self.config.mixture_by, [part.train for part in self.parts.values()]
        sizes = [s.num_tokens if by == "tokens" else s.num_documents for s in stores]
        found = rates(sizes, self.config.mixture_exponent, self.config.mixture_cap)
        return dict(zip(self.parts, found.tolist(), strict=True))

    def training(
        self, *, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> Pipeline | Mixture:
        """The batches to train on. Raises what `Pipeline` and `Mixture` raise."""
        stores = {name: part.train for name, part in self.parts.items()}
        where = {"batch_size": batch_size, "seed": seed, "rank": rank, "world": world}
        if not self.config.is_mixture:
            return Pipeline(self.config, stores[""], self.tokenizer, **where)
        weights = np.array(list(self.rates.values()))
        return Mixture(self.config, stores, self.tokenizer, weights, **where)

    def held_out(
        self, *, batch_size: int, batches: int, rank: int = 0, world: int = 1
    ) -> ValidationSet:
        """At most `batches` batches, shared out equally over the corpora, one at least for each.

        In the mean of the corpora's losses each weighs as much as it gives rows to train on, so
        that it is the loss that training brings down. Raises what `validation_batches` raises.
        """
        each = -(-batches // len(self.parts))
        found: dict[str, list[Batch]] = {}
        for name, part in self.parts.items():
            with naming(name):
                found[name] = validation_batches(
                    self.config,
                    part.validation,
                    self.tokenizer,
                    batch_size=batch_size,
                    batches=each,
                    rank=rank,
                    world=world,
                )
        lengths = byte_lengths(self.tokenizer)
        return ValidationSet(
            found, self.rates, {n: tokens_and_bytes(own, lengths) for n, own in found.items()}
        )

    def served(self) -> dict[str, Coverage]:
        """How the tokenizer serves each corpus of a mixture by languages."""
        return {
            name: measure_coverage(name, self.sources[name].documents(), self.tokenizer)
            for name in self.parts
        }

    def summary(self, batches: Mixture, steps: int) -> str:
        """A table of the mixture: sizes, share of the rows, epochs in a run of `steps` steps."""
        epochs, shares = batches.epochs(steps), self.rates
        wide = max(len("corpus"), *map(len, self.parts))
        lines = [f"{'corpus':<{wide}} {'tokens':>16} {'documents':>12} {'rows':>7} {'epochs':>9}"]
        for name, part in self.parts.items():
            lines.append(
                f"{name:<{wide}} {part.train.num_tokens:>16,} {part.train.num_documents:>12,} "
                f"{shares[name]:>7.2%} {epochs[name]:>9.3g}"
            )
        return "\n".join([*lines, f"Epochs: how often each is read in {steps:,} steps."])

    def __str__(self) -> str:
        """What there is of each corpus, or which of its shards are still missing."""
        return "\n".join(
            f"{name}: {part}" if name else f"{part}" for name, part in self.parts.items()
        )


def open_dataset(
    config: DataConfig,
    *,
    vocab_size: int,
    shard: tuple[int, int] | None = None,
    quiet: bool = False,
) -> TextDataset:
    """The tokenizer and the stores of every corpus; what is missing is made, the rest is opened.

    Arguments and errors are those of `prepare`, which see to one corpus after the other. A
    tokenizer trained here learns from all corpora, mixed by their rates.
    """
    if config.tasks:
        from switchworks.data.tasks.dataset import prepare_tasks  # which is made of this module

        return prepare_tasks(config, vocab_size=vocab_size, quiet=quiet)
    if not config.is_mixture:
        alone = prepare(config, vocab_size=vocab_size, shard=shard, quiet=quiet)
        return TextDataset(config, alone.tokenizer, {"": alone})
    own = config.of_corpora or languages_of(config, cache_folder(config))
    sources: dict[str, Documents] = {}
    for name, settings in own.items():  # all are looked at before any work is done on one
        with naming(name):
            sources[name] = open_documents(settings, cache_folder(config))
    tokenizer = config.tokenizer
    if tokenizer == "train":
        tokenizer = str(_trained(config, list(sources.values()), vocab_size, quiet))
    parts: dict[str, PreparedCorpus] = {}
    for name, settings in own.items():
        settings = replace(settings, tokenizer=tokenizer)
        with naming(name):
            parts[name] = prepare(
                settings, vocab_size=vocab_size, shard=shard, quiet=quiet, name=name
            )
    kept = parts if config.mixture else _long_enough(config, parts)
    return TextDataset(config, next(iter(kept.values())).tokenizer, kept, sources)


def _long_enough(
    config: DataConfig, parts: Mapping[str, PreparedCorpus]
) -> Mapping[str, PreparedCorpus]:
    """The languages whose text fills a row on both sides; the others are named in the log.

    All of them while shards are missing. Raises DataError if none is left, or for one that was
    asked for by name.
    """
    if any(part.missing for part in parts.values()):
        return parts
    kept: dict[str, PreparedCorpus] = {}
    for name, part in parts.items():
        for store in (part.train, part.validation):
            try:
                Pipeline(config, store, part.tokenizer, batch_size=1, seed=0)
            except DataError as error:
                said = str(error).partition("\n")[0]
                if names_languages(config):
                    side = "to train on" if store.split == "train" else "held out"
                    raise unusable(name, f"of its text {side}: {said.rstrip('.')}") from error
                log = logging.getLogger(__name__)
                log.warning("%s is left out, %s text: %s", name, store.split, said)
                break
        else:
            kept[name] = part
    if not kept:
        raise DataError(
            "No language has enough text for one row to train on and one held out.\n"
            "  Use a shorter --data.input-length, or more text."
        )
    return kept


def _trained(
    config: DataConfig, sources: Sequence[Documents], vocab_size: int, quiet: bool
) -> Path:
    """The folder of the tokenizer that learns from all `sources`.

    Tokens cannot be counted before there is a tokenizer, so sizes are in characters here, and
    `mixture_cap`, which counts something else, has no say. If the size of one is not known, as of a
    data set, all are drawn equally.
    """
    sizes = [source.num_characters for source in sources]
    known = [size for size in sizes if size is not None]  # of all, or none of them counts
    shares = rates(
        [max(1, size) for size in known] if len(known) == len(sizes) else [1] * len(sizes),
        config.mixture_exponent,
    )
    named = [source.fingerprint() for source in sources], config.mixture_exponent
    return trained_tokenizer(
        cache_folder(config),
        repr(named),
        draw(sources, shares),
        vocab_size,
        quiet,
        coverage=config.character_coverage,
    )


def draw(sources: Sequence[Documents], shares: Float[np.ndarray, " K"]) -> Iterator[str]:
    """Documents of all `sources`, such that the text of each grows in proportion to its share.

    A source that ends begins again, as it will in training, until every one has ended once.
    """
    streams = [spread(source) for source in sources]
    unfinished = set(range(len(sources)))
    turns = [(0.0, index) for index in unfinished]  # (characters given per share, source)
    while unfinished and turns:
        given, index = heapq.heappop(turns)
        text = next(streams[index], None)
        if text is None:
            unfinished.discard(index)
            if given == 0.0:
                continue  # it is empty
            streams[index] = spread(sources[index])
            heapq.heappush(turns, (given, index))
            continue
        heapq.heappush(turns, (given + len(text) / float(shares[index]), index))
        yield text
