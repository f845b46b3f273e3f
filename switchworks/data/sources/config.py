"""Where text comes from: the settings that a data source reads."""

from dataclasses import dataclass

from switchworks.config import ConfigError, check_at_least


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text of one corpus, or of one corpus for each language."""

    path: str | None = None
    """Own text: a file, a folder or a glob of .txt, .jsonl or .parquet, each also .gz or .zst.
    When given, `source` is not used."""
    languages: tuple[str, ...] = ()
    """One corpus for each of these languages, mixed as by `mixture`: codes such as de pt-BR
    zh-Hans, or all. Of `path`, a folder with LANG/... or LANG.txt; of a dataset whose configs are
    mC4's codes; or of `catalogs`, where none named means all."""
    min_sentences: int = 20
    """A language with fewer sentences is left out of all, and refused where it was named."""
    source: str = "python_docs"
    """python_docs and catalogs: the embedded corpus, English or in a hundred languages. hub: a
    Hugging Face dataset, named by the next four settings. Or a name in `switchworks.data.SOURCES`
    that your own code registered."""
    dataset: str | None = None
    """Name on the Hub, or a local folder that `datasets.load_dataset` opens."""
    dataset_config: str | None = None
    split: str = "train"
    validation_split: str | None = None
    """A dataset's own validation split. Without one, documents are held out by their hash."""
    streaming: bool = False
    column: str = "text"
    """The column (Parquet, Hub) or key (JSONL) that holds the text."""
    validation_share: float = 0.02
    """Share of the documents held out for validation, chosen by a hash of the document's text."""
    documents: int | None = None
    """Read at most this many documents of each corpus, from its beginning. None: all."""
    workers: int = 0
    """Threads that tokenise, and processes that extract an embedded corpus. 0: one per core."""

    def check_text(self) -> None:
        """Raises ConfigError for a setting of the text that cannot work."""
        check_at_least(self, "data.", 0, "workers")
        check_at_least(self, "data.", 1, "min_sentences")
        if self.documents is not None and self.documents < 1:
            raise ConfigError(f"data.documents = {self.documents} leaves no text. Use 1 or more.")
        if not 0 < self.validation_share < 1:
            raise ConfigError(
                f"data.validation_share = {self.validation_share} is not a share between 0 and 1."
            )
        if "all" in self.languages and len(self.languages) > 1:
            raise ConfigError(
                f"data.languages = {' '.join(self.languages)}: all is every language there is.\n"
                "  Say all and no more, or name some."
            )
