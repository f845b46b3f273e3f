"""The source `hub`: a dataset that `datasets.load_dataset` opens, on the Hub or in a folder."""

import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from switchworks.config import ConfigError, DataError
from switchworks.data.cache import digest, file_stats
from switchworks.data.sources.catalogs.languages import MC4, english_name, mc4_code, normalise
from switchworks.data.sources.reading import check_column, format_of, warn_once
from switchworks.data.sources.tables import TABLE_FORMATS, read_tables
from switchworks.data.sources.text_source import ALL, TextConfig, TextSource

_C4_AND_MC4 = "allenai/c4"
_MC4_ENGLISH = "en-multi"
"""The config of mC4's English in allenai/c4, where "en" is C4's."""
_SECONDS_TO_CONNECT = 5.0


@contextmanager
def hub_cache_if_offline() -> Iterator[None]:
    """Inside, the Hub's libraries read their cache alone if the Hub does not answer at once; they
    would try again for half a minute. Behind a proxy they find out themselves."""
    from datasets import config
    from huggingface_hub import constants

    address, known = urlsplit(constants.ENDPOINT), (config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)
    try:
        if not getproxies() and not any(known):
            port = address.port or (80 if address.scheme == "http" else 443)
            socket.create_connection((address.hostname or "", port), _SECONDS_TO_CONNECT).close()
    except OSError:
        config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = known


@dataclass(frozen=True)
class HubDataset(TextSource):
    """The split of a dataset that `config` names, whole or streamed."""

    is_local: ClassVar[bool] = False

    config: TextConfig

    @classmethod
    def check(cls, config: TextConfig) -> None:
        if not config.dataset:
            raise ConfigError(
                "data.source = 'hub' needs the name of a dataset.\n"
                "  Set it, for example --data.dataset allenai/c4 --data.dataset-config en."
            )

    @classmethod
    def open(cls, config: TextConfig, cache: Path) -> "HubDataset":
        assert config.dataset is not None  # `check` saw to it
        name = config.dataset  # which may be a folder
        name = str(Path(name).expanduser()) if name.startswith("~") else name
        return HubDataset(replace(config, dataset=name))

    @classmethod
    def mixture_settings(cls, argument: str) -> dict[str, Any]:
        dataset, _, config = argument.partition(":")
        return {"dataset": dataset, "dataset_config": config or None}

    @classmethod
    def language_configs(cls, config: TextConfig, cache: Path) -> Mapping[str, TextConfig]:
        """The config of mC4 for each language, which mC4 calls by codes of its own."""
        configs: dict[str, TextConfig] = {}
        language_of: dict[str, str] = {}
        for name in map(normalise, MC4 if ALL in config.languages else config.languages):
            code = mc4_code(name)
            if code is None:
                raise DataError(
                    f"mC4 has no text in {english_name(name)} ({name}).\n  It has: {' '.join(MC4)}."
                )
            if language_of.setdefault(code, name) != name:
                raise DataError(
                    f"{language_of[code]} and {name} are both {code} in mC4, which does not "
                    "distinguish them.\n  Name one of them."
                )
            if code == "en" and _has_c4(config.dataset or ""):
                code = _MC4_ENGLISH
            configs[name] = replace(config, languages=(), dataset_config=code)
        return configs

    def documents(self, shard: int = 0, num_shards: int = 1) -> Iterator[str]:
        rows = self._load()
        if not self.config.streaming or rows.num_shards >= num_shards:
            rows = rows.shard(num_shards, shard, contiguous=False)
        else:
            rows = islice(rows, shard, None, num_shards)
        return self._texts(rows)

    def _texts(self, rows: Iterable[Any]) -> Iterator[str]:
        """The texts of `rows` that are not empty; how many are no text is logged."""
        column, others, first = self.config.column, 0, ""
        with self._naming_errors():
            for number, row in enumerate(rows, start=1):
                text = row[column]
                if not isinstance(text, str):
                    others, first = others + 1, first or f"record {number}: {str(text)[:60]}"
                elif text.strip():
                    yield text
        if others:
            warn_once(
                f"{self._label}: {others} records were left out: their {column!r} is not a string. "
                f"First: {first}"
            )

    def fingerprint(self) -> str:
        # A local folder is identified by its files; of the Hub only the name is known beforehand.
        config, folder = self.config, Path(self.config.dataset or "")
        files = sorted(folder.rglob("*")) if folder.is_dir() else []
        stats = file_stats(path for path in files if path.is_file())
        names = config.dataset, config.dataset_config, config.split, config.column
        return digest(*names, stats)

    def validation(self) -> TextSource | None:
        split = self.config.validation_split
        if split is None:
            return None
        return HubDataset(replace(self.config, split=split, validation_split=None))

    def _load(self) -> Any:
        import datasets  # two seconds, and only this source needs it

        config, split = self.config, self.config.split
        name, subset, streaming = config.dataset or "", config.dataset_config, config.streaming
        with self._naming_errors(), hub_cache_if_offline():
            rows = datasets.load_dataset(name, subset, split=split, streaming=streaming)
            names = rows.column_names or list(next(iter(rows), {}))
        check_column(config.column, names, self._label)
        return rows if streaming else rows.select_columns([config.column])

    @property
    def _label(self) -> str:
        name, config, split = self.config.dataset, self.config.dataset_config, self.config.split
        return f"dataset {name!r}, config {config!r}, split {split!r}"

    @contextmanager
    def _naming_errors(self) -> Iterator[None]:
        """Raises DataError for whatever the library raises (many kinds, by source)."""
        try:
            yield
        except Exception as error:
            reason = str(error.__cause__ or error).partition("\n")[0]
            raise DataError(
                f"{self._label} cannot be opened or read: {reason}{self._odd_file()}\n"
                "  Check --data.dataset and --data.dataset-config, or the entry of "
                "--data.mixture, and --data.split."
            ) from error

    def _odd_file(self) -> str:
        """The first file of a local folder that cannot be read, or lacks the column."""
        files = sorted(Path(self.config.dataset or "").rglob("*"))
        for path in (path for path in files if format_of(path, TABLE_FORMATS)):
            try:
                for row in read_tables([path]):
                    check_column(self.config.column, list(row), str(path))
            except DataError as error:
                return f"\n  {error}"
        return ""


def _has_c4(dataset: str) -> bool:
    """Whether `dataset`, by its name or as a copy in a folder, has C4 beside mC4."""
    if dataset == _C4_AND_MC4:
        return True
    card = Path(dataset).expanduser() / "README.md"
    entry = f"config_name: {_MC4_ENGLISH}\n"
    return card.is_file() and entry in card.read_text(encoding="utf-8")
