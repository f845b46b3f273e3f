"""The source `catalogs`: the embedded corpus in a hundred languages, one corpus for each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import ClassVar, Literal

from switchworks.data.cache import digest
from switchworks.data.sources.per_language import choose_languages, too_few
from switchworks.data.sources.text_source import TextConfig, TextSource


@dataclass(frozen=True)
class Catalogs(TextSource):
    """The sentences of one language in the corpus at `corpus`, each a document."""

    settings: ClassVar[tuple[str, ...]] = ("languages", "min_sentences")
    always_by_language: ClassVar[bool] = True

    corpus: Path
    language: str
    validation_share: float
    side: Literal["train", "validation"] = "train"

    @classmethod
    def check(cls, config: TextConfig) -> None:
        """Any languages will do."""

    @classmethod
    def open(cls, config: TextConfig, cache: Path) -> "Catalogs":
        from switchworks.data.sources.catalogs.gettext import catalogs  # imports babel

        (language,) = config.languages  # one of those that `language_configs` returns
        return Catalogs(catalogs(cache), language, config.validation_share)

    @classmethod
    def language_configs(cls, config: TextConfig, cache: Path) -> Mapping[str, TextConfig]:
        from switchworks.data.sources.catalogs.gettext import catalogs, split_sentences

        sentences = split_sentences(catalogs(cache), config.validation_share)

        def lack_of(code: str) -> str | None:
            if not (sentences[code].train and sentences[code].validation):
                return "all its sentences would be on one side, to train on or for validation"
            return too_few(config, sentences[code].num_sentences)

        configs = {code: replace(config, languages=(code,)) for code in sentences}
        return choose_languages(config, configs, lack_of)

    @property
    def num_characters(self) -> int:
        return sum(map(len, self._texts()))

    def documents(self, shard: int = 0, num_shards: int = 1) -> Iterator[str]:
        return islice(self._texts(), shard, None, num_shards)

    def fingerprint(self) -> str:
        return digest(self.corpus.name, self.language, self.validation_share, self.side)

    def validation(self) -> TextSource | None:
        return replace(self, side="validation") if self.side == "train" else None

    def _texts(self) -> Iterator[str]:
        """Without repetition: two English messages may have the same translation."""
        from switchworks.data.sources.catalogs.gettext import split_sentences

        split = split_sentences(self.corpus, self.validation_share)[self.language]
        return iter(dict.fromkeys(sentence.text for sentence in getattr(split, self.side)))
