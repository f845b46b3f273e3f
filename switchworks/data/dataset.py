"""All that a run reads: one corpus or a mixture, from token stores to batches."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from switchworks.batch import Batch
from switchworks.config import DataError
from switchworks.data import cache
from switchworks.data.config import DataConfig
from switchworks.data.rows.mixture import Mixture, corpus_mixture, naming_corpus, rates
from switchworks.data.rows.pipeline import VALIDATION_SEED, Pipeline, RunRows, validation_batches
from switchworks.data.sources.text_source import TextSource
from switchworks.data.tokens.coverage import (
    Coverage,
    byte_lengths,
    measure_coverage,
    poorly_covered,
    tokens_and_bytes,
)
from switchworks.data.tokens.prepare import PreparedCorpus
from switchworks.data.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class ValidationSet:
    """Validation batches of each corpus by its name, and the weight of each loss in the mean."""

    batches: Mapping[str, list[Batch]]
    shares: Mapping[str, float]
    sizes: Mapping[str, tuple[float, float]]
    """Target tokens, with sentinels and EOS, and UTF-8 bytes of the text they hide."""

    def bits_per_byte(self, name: str, nats: float) -> float:
        """Bits per byte of a corpus from `nats` per target token."""
        tokens, size = self.sizes[name]
        return nats * tokens / max(1.0, size) / math.log(2)


@dataclass(frozen=True)
class TextDataset:
    """One tokenizer, and the tokens of each corpus by its name; a single corpus is named ""."""

    config: DataConfig
    tokenizer: Tokenizer
    parts: Mapping[str, PreparedCorpus]
    sources: Mapping[str, TextSource] = field(default_factory=dict)
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
        """Tokens to train on, of all corpora together."""
        return sum(store.num_tokens for store in self._stores("train").values())

    @property
    def digest(self) -> str:
        """Hexadecimal hash of the tokenizer and of all tokens of both splits in their order. Equal
        wherever the same text was made the same tokens, whatever its files are called."""
        stores = {
            name: [getattr(store, "digest", None) for store in (part.train, part.validation)]
            for name, part in self.parts.items()
        }
        return cache.digest(self.tokenizer.fingerprint, stores)

    def difference(self, metadata: Mapping[str, Any]) -> str | None:
        """How this text differs from that of the run with this about.json; None: it is the same, or
        the run has none."""
        if not metadata or metadata["text_digest"] == self.digest:
            return None
        if metadata["train_tokens"] == self.train_tokens:
            return "other tokens, though as many"
        lost = [name for name in metadata.get("corpora", {}) if name not in self.parts]
        return f"{metadata['train_tokens']:,} tokens there, {self.train_tokens:,} here" + (
            f", where {', '.join(lost)} are missing" if lost else ""
        )

    @property
    def label_counts(self) -> Mapping[str, Mapping[str, int]]:
        """How often each possible answer of a task that is a classification is trained on; text has
        none."""
        return {}

    @property
    def rates(self) -> dict[str, float]:
        """The share of the rows of each corpus."""
        by, stores = self.config.mixture_by, [part.train for part in self.parts.values()]
        sizes = [s.num_tokens if by == "tokens" else s.num_documents for s in stores]
        shares = rates(sizes, self.config.mixture_exponent, self.config.mixture_cap)
        return dict(zip(self.parts, shares.tolist(), strict=True))

    def training(
        self, *, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> Pipeline | Mixture:
        """The batches to train on. Raises ConfigError for ranks and lengths that cannot work,
        DataError for text that does not fill a row, naming the corpus."""
        run = RunRows(batch_size=batch_size, seed=seed, rank=rank, world=world)
        return self._stream(self._stores("train"), run)

    def held_out(
        self, *, batch_size: int, batches: int, rank: int = 0, world: int = 1
    ) -> ValidationSet:
        """At most `batches` validation batches, equally many of each corpus and at least one.

        In the mean of the corpora's losses each weighs as much as it gives rows (examples of tasks)
        to train on, so that it is the loss that training minimises. Raises what `training` raises.
        """
        run = RunRows(batch_size=batch_size, seed=VALIDATION_SEED, rank=rank, world=world)
        stores = self._stores("validation")
        limit, lengths = -(-batches // len(stores)), byte_lengths(self.tokenizer)
        by_corpus = {}
        for name, store in stores.items():
            with naming_corpus(name):
                by_corpus[name] = validation_batches(self._held_out(name, store, run), limit)
        shares = {name: rate for name, rate in self.rates.items() if name in stores}
        shares = {name: rate / sum(shares.values()) for name, rate in shares.items()}
        sizes = {name: tokens_and_bytes(part, lengths) for name, part in by_corpus.items()}
        return ValidationSet(by_corpus, shares, sizes)

    def _stores(self, split: str) -> dict[str, Any]:
        return {name: getattr(part, split) for name, part in self.parts.items()}

    def _stream(self, stores: Mapping[str, Any], run: RunRows) -> Pipeline | Mixture:
        if not self.config.is_mixture:
            return Pipeline(self.config, stores[""], self.tokenizer, run)
        weights = np.array(list(self.rates.values()))
        return corpus_mixture(self.config, stores, self.tokenizer, weights, run)

    def _held_out(self, name: str, store: Any, run: RunRows) -> Pipeline | Mixture:
        try:
            return Pipeline(self.config, store, self.tokenizer, run)
        except DataError as error:
            fix = "Or raise data.validation_share."
            raise DataError(f"Validation text: {error}\n  {fix}") from error

    def coverage(self) -> dict[str, Coverage]:
        """The tokenizer's coverage of each corpus of a mixture by languages."""
        return {
            name: measure_coverage(name, self.sources[name].documents(), self.tokenizer)
            for name in self.parts
        }

    def coverage_warning(self) -> str:
        """A warning that names poorly covered languages; "" if none is, if the mixture is not by
        language, or if its text is too far away to be read again."""
        if not (self.by_language and all(source.is_local for source in self.sources.values())):
            return ""
        return poorly_covered(self.coverage())

    def summary(self, batches: Mixture, steps: int) -> str:
        """A table of the mixture: sizes, share of the rows, epochs in a run of `steps` steps."""
        epochs, shares = batches.epochs(steps), self.rates
        width = max(len("corpus"), *map(len, self.parts))
        lines = [f"{'corpus':<{width}} {'tokens':>16} {'documents':>12} {'rows':>7} {'epochs':>9}"]
        for name, part in self.parts.items():
            lines.append(
                f"{name:<{width}} {part.train.num_tokens:>16,} {part.train.num_documents:>12,} "
                f"{shares[name]:>7.2%} {epochs[name]:>9.3g}"
            )
        return "\n".join([*lines, f"Epochs: how often each is read in {steps:,} steps."])

    def __str__(self) -> str:
        """The stores of each corpus, or which of its shards are still missing."""
        return "\n".join(f"{name}: {part}".removeprefix(": ") for name, part in self.parts.items())
