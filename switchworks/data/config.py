"""How text becomes batches: the settings of `data/`, with those of its sources."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from switchworks.config import (
    ConfigError,
    check_at_least,
    check_at_most,
    check_literals,
    check_positive,
    check_rate,
    with_field_help,
)
from switchworks.data.sources import SOURCES, source_class
from switchworks.data.sources.tables import Quoting
from switchworks.data.sources.text_source import TextConfig


@with_field_help
@dataclass(frozen=True, kw_only=True)
class DataConfig(TextConfig):
    """The text, its tokenizer and the objective that makes training examples from it."""

    mixture: tuple[str, ...] = ()
    """Several corpora instead of one, each as NAME=PATH, with PATH as `path`, or as
    NAME=hub:DATASET or NAME=hub:DATASET:CONFIG: en=texts/en c4=hub:allenai/c4:en. All have one
    tokenizer; each has its own validation text and its own loss."""
    mixture_exponent: float = 0.3
    """A corpus of size n gives rows in proportion to n ** this: 1 is by size, 0 equally often.
    mT5 used 0.3, which shows small languages more often than their size would."""
    mixture_by: Literal["tokens", "documents"] = "tokens"
    """The unit of a corpus's size. mT5 counted documents."""
    mixture_cap: int | None = None
    """A larger corpus counts as one of this size, as in T5's mixtures of tasks."""

    tokenizer: str = "train"
    """"train" makes a SentencePiece model from the text, "bytes" needs none (ByT5's ids), and
    anything else is the path of a `spiece.model`, a tokenizer.json, a folder with one or a run."""
    character_coverage: float = 0.9999
    """Share of the text's characters that have pieces in a tokenizer trained here. The others are
    encoded in bytes."""
    cache: str | None = None
    """Folder for tokenizers and token stores. None: $SWITCHWORKS_CACHE, else switchworks in
    $XDG_CACHE_HOME, else ~/.cache/switchworks."""

    objective: Literal["span_corruption", "prefix", "causal"] = "span_corruption"
    """"span_corruption" hides spans of the text, which the model predicts (T5). "prefix": a row's
    beginning is the input, and the model continues it, so that half of the positions or more can be
    targets (prefix LM, Raffel et al. 2020, section 3.2.1, at a fixed place). "causal": every token
    is predicted from those before it, for decoder-only models."""
    input_length: int = 512
    """L: encoder positions per row, the closing EOS included. "causal" has none: 0. For tasks of a
    decoder-only model, positions of the prompt."""
    target_length: int = 114
    """T: decoder positions per row, the closing EOS included; for "causal" the whole row."""
    noise_density: float = 0.15
    """Share of the tokens that are hidden."""
    mean_span: float = 3.0
    """Mean length, in tokens, of a hidden span."""
    packing: Literal["stream", "documents"] = "stream"
    """"stream": a row is a window over the concatenated documents, corrupted as one, as T5 does.
    "documents": the documents in the window are corrupted separately and packed with segment ids,
    so that no position attends to another document. "causal" takes the same windows for both;
    "prefix" has streams alone."""

    tasks: tuple[str, ...] = ()
    """Train on tasks instead of text: glue_mnli, super_glue, ..., your own table as
    NAME=PATH:INPUT:TARGET, or a Python file with a TASK. docs/tasks.md lists them all."""
    task_folder: str | None = None
    """Folder with local copies of the tasks' datasets, one folder per task. None: the Hub."""
    task_rates: Literal["examples", "tokens", "equal"] = "examples"
    """A task's share of the training is in proportion to its number of examples (T5) or tokens, and
    is a share of the examples or tokens; or all are equal."""
    task_cap: int | None = 1 << 19
    """A task with more examples counts as one with so many, as in T5's mixtures."""
    task_temperature: float = 1.0
    """Shares are in proportion to size ** (1 / temperature): 1 is by size, more is more equal."""
    task_packing: Literal["auto", "packed", "padded"] = "auto"
    """"packed": a row holds as many examples of one task as fit. "padded": one, as decoder-only
    models need it. "auto" packs for models with an encoder."""
    task_metrics: tuple[str, ...] = ("accuracy",)
    """The metrics of tasks from tables."""
    task_labels: tuple[str, ...] = ()
    """The only targets that tasks from tables may have. Empty: any."""
    task_delimiter: str | None = None
    """What stands between the columns of .csv and .tsv tables where their first lines do not tell:
    one character, or tab. Of several tables it is for those whose first line it splits."""
    task_quoting: Quoting = "auto"
    """Whether a quote at the beginning of a cell encloses it, up to the next. auto: in .csv, while
    in .tsv a quote is a character."""
    task_skip_bad: bool = False
    """Leave out and count the records of tasks that cannot be read (a list, null or NaN for a text,
    a target outside task_labels). Otherwise the first one stops the run."""
    prefetch: int = 4
    """Batches prepared ahead of the step that needs them. 0: none, made in the calling thread."""

    def __post_init__(self) -> None:
        check_literals(self, "data.")
        self._check_mixture()
        self.check_text()
        if not 0.98 <= self.character_coverage <= 1:
            raise ConfigError(
                f"data.character_coverage = {self.character_coverage} is not a share between 0.98 "
                "and 1, as SentencePiece needs.\n  It advises 0.9995 where characters are many."
            )
        source = source_class(self)
        if not self.mixture and not self.tasks:
            source.check(self)
            if self.packages and source is not SOURCES["package_docs"]:
                raise ConfigError(
                    f"data.packages = {' '.join(self.packages)} names wheels, and another source "
                    "is read.\n  Set --data.source package_docs too."
                )
        self._check_delimiter()
        self._check_causal()
        self._check_prefix()
        check_rate(self, "data.", "noise_density")
        check_positive(self, "data.", "noise_density", "mixture_cap")
        check_at_least(self, "data.", 0, "prefetch", "input_length")
        check_at_most(self, "data.", 1 << 24, "input_length", "target_length")
        check_at_most(self, "data.", 1 << 10, "prefetch", "workers")
        check_at_least(
            self, "data.", 1, "target_length", "mean_span", "task_temperature", "task_cap"
        )

    @property
    def corpora(self) -> "Mapping[str, DataConfig]":
        """The settings of each corpus of the mixture by its name, in the order given."""
        return {
            name: replace(
                self, mixture=(), source=source, **SOURCES[source].mixture_settings(argument)
            )
            for name, source, argument in map(_parse_entry, self.mixture)
        }

    @property
    def is_mixture(self) -> bool:
        """Whether there are several corpora: named ones, or one for each language."""
        return bool(self.mixture or self.languages or source_class(self).always_by_language)

    @property
    def named(self) -> str:
        """What is read, in a few words: names of tasks, corpora or languages, or the path."""
        corpora = tuple(name for name, _, _ in map(_parse_entry, self.mixture))
        names = self.tasks or corpora or self.languages
        return ", ".join(names) or self.path or self.dataset or self.source

    @property
    def packs_tasks(self) -> bool:
        """Whether a row may hold several examples of a task."""
        is_auto = self.task_packing == "auto" and self.objective != "causal"
        return is_auto or self.task_packing == "packed"

    def _check_mixture(self) -> None:
        if not 0 <= self.mixture_exponent <= 1:
            raise ConfigError(
                f"data.mixture_exponent = {self.mixture_exponent} is not between 0, equally often, "
                "and 1, by size.\n  mT5 used 0.3. It is the inverse of a temperature."
            )
        names = [_parse_entry(entry)[0] for entry in self.mixture]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(
                    f"data.mixture names {name!r} {names.count(name)} times.\n"
                    "  Give each corpus a name of its own."
                )
        for setting in ("path", "dataset", "languages", "tasks"):
            value = getattr(self, setting)
            if self.mixture and value:
                nothing = " none" if isinstance(value, str) else ", with nothing after it,"
                raise ConfigError(
                    f"data.mixture and data.{setting} = {value!r} both say what to train on.\n"
                    f"  Keep one of them; --data.{setting}{nothing} removes the second."
                )

    def _check_delimiter(self) -> None:
        delimiter = self.task_delimiter
        if delimiter is not None and not re.fullmatch(r'[^"\r\n]|tab', delimiter):
            raise ConfigError(
                f"data.task_delimiter = {self.task_delimiter!r} is not one character other than a "
                "quote or a line end.\n  Examples: --data.task-delimiter ';' or tab."
            )

    def _check_causal_tasks(self) -> None:
        """A decoder-only model reads a prompt of `input_length` and learns from the target only."""
        if self.task_packing == "packed":
            raise ConfigError(
                "data.task_packing = 'packed', but a decoder-only model reads a prompt and its "
                "target as one text,\n  of which only the target is learnt. "
                "Set --data.task-packing padded."
            )
        if self.input_length < 2:
            prompt = max(2, round(0.8 * self.target_length))
            raise ConfigError(
                f"data.input_length = {self.input_length} leaves no room for the inputs of "
                "data.tasks, which a decoder-only model reads as prompts.\n"
                f"  Share the row out, for example --data.input-length {prompt} "
                f"--data.target-length {max(2, self.target_length - prompt)}."
            )

    def _check_prefix(self) -> None:
        if self.objective == "prefix" and self.packing == "documents":
            raise ConfigError(
                "data.packing = 'documents', but of a document that begins in the targets nothing "
                "is in the inputs to be continued.\n  Set --data.packing stream."
            )

    def _check_causal(self) -> None:
        if self.objective != "causal":
            return
        if self.tasks:
            return self._check_causal_tasks()
        if self.input_length:
            raise ConfigError(
                f"data.input_length = {self.input_length}, but the causal objective has no inputs: "
                "a row is data.target_length tokens.\n"
                f"  Set --data.input-length 0 --data.target-length "
                f"{self.input_length + self.target_length}."
            )
        if self.target_length < 2:
            raise ConfigError(
                f"data.target_length = {self.target_length} leaves nothing to continue. Use at "
                "least 2 tokens, and better hundreds."
            )


def cache_folder(config: DataConfig) -> Path:
    """`config.cache`, else $SWITCHWORKS_CACHE, else switchworks in $XDG_CACHE_HOME or ~/.cache."""
    if folder := config.cache or os.environ.get("SWITCHWORKS_CACHE"):
        return Path(folder).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # the standard ignores relative ones
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "switchworks"


def _parse_entry(entry: str) -> tuple[str, str, str]:
    """(name, source, argument) of NAME=PATH, or of NAME=SOURCE:ARGUMENT. Raises ConfigError."""
    name, equals, value = entry.partition("=")
    prefix, colon, argument = value.partition(":")
    source = prefix if colon and prefix in SOURCES else "files"
    argument = argument if source == prefix else value
    if not (equals and argument.partition(":")[0] and re.fullmatch(r"[\w.-]+", name)):
        raise ConfigError(
            f"data.mixture has {entry!r}, which is neither NAME=PATH nor NAME=hub:DATASET.\n"
            "  Example: en=texts/en. Names have letters, digits, '.', '_' and '-'."
        )
    return name, source, argument
