"""Where text comes from and how it becomes batches: the settings of `data/`."""

from dataclasses import dataclass
from typing import Literal

from switchworks.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text, its tokenizer and the span corruption that makes training pairs from it."""

    path: str | None = None
    """Own text: a file, a folder or a glob of .txt, .jsonl or .parquet, each also .gz or .zst.
    When given, `source` is not used."""
    source: Literal["python_docs", "hub"] = "python_docs"
    """The embedded corpus, or a Hugging Face dataset named by the next four settings."""
    dataset: str | None = None
    """Name on the Hub, or a local folder that `datasets.load_dataset` opens."""
    dataset_config: str | None = None
    split: str = "train"
    validation_split: str | None = None
    """A dataset's own held-out split. Without one, documents are held out by their hash."""
    streaming: bool = False
    column: str = "text"
    """The column (Parquet, Hub) or key (JSONL) that holds the text."""
    validation_share: float = 0.02
    """Share of the documents held out, chosen by a hash of the document's text."""

    tokenizer: str = "train"
    """"train" makes a SentencePiece model from the text, "bytes" needs none (ByT5's ids), and
    anything else is the path of a `spiece.model` or of a folder that holds one."""
    cache: str | None = None
    """Folder for tokenizers and token stores. None: $SWITCHWORKS_CACHE, else
    ~/.cache/switchworks."""
    workers: int = 0
    """Processes that tokenise. 0: one per core."""

    input_length: int = 512
    """L: encoder positions per row, the closing EOS included."""
    target_length: int = 114
    """T: decoder positions per row, the closing EOS included."""
    noise_density: float = 0.15
    """Share of the tokens that are hidden."""
    mean_span: float = 3.0
    """Mean length, in tokens, of a hidden span."""
    packing: Literal["stream", "documents"] = "stream"
    """"stream": a row is a window over the concatenated documents, corrupted as one, as T5 does.
    "documents": the documents in the window are corrupted apart and packed with segment ids, so
    that nothing is seen across their borders."""
    prefetch: int = 4
    """Batches made ahead of the step that needs them. 0: none, made in the calling thread."""

    def __post_init__(self) -> None:
        if self.source == "hub" and self.path is None and not self.dataset:
            raise ConfigError(
                "data.source = 'hub' needs the name of a dataset.\n"
                "  Set it, for example --data.dataset allenai/c4 --data.dataset-config en."
            )
        if not 0 < self.noise_density < 1:
            raise ConfigError(
                f"data.noise_density = {self.noise_density} is not a share between 0 and 1.\n"
                "  T5 hides 0.15 of the tokens."
            )
        if self.mean_span < 1:
            raise ConfigError(
                f"data.mean_span = {self.mean_span} is shorter than one token. T5 uses 3.0."
            )
        if not 0 < self.validation_share < 1:
            raise ConfigError(
                f"data.validation_share = {self.validation_share} is not a share between 0 and 1."
            )
