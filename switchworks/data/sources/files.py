"""The source `files`: own text in a file, a folder or the files of a glob."""

import codecs
import glob
import shlex
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from switchworks.config import ConfigError, DataError
from switchworks.data.cache import digest, file_stats
from switchworks.data.sources.catalogs.languages import normalise
from switchworks.data.sources.reading import (
    COMPRESSIONS,
    FORMATS,
    UndecodableError,
    characters,
    format_of,
    read_documents,
)
from switchworks.data.sources.text_source import (
    ALL,
    NoText,
    TextConfig,
    TextSource,
    choose_languages,
    too_few,
)
from switchworks.progress import tracked

MOST_NAMED = 20
"""Files that an error lists."""
LINE_CHARACTERS = 100
"""A line counts as one sentence, and a longer one as one for every so many characters."""


@dataclass(frozen=True)
class Files(TextSource):
    """The text files `paths`, in this order."""

    paths: tuple[Path, ...]
    column: str
    encoding: str = "utf-8"

    @classmethod
    def check(cls, config: TextConfig) -> None:
        if config.path is None:
            raise ConfigError("data.source = 'files' needs a path. Set --data.path.")
        try:
            codecs.lookup(config.encoding)
        except LookupError:
            raise ConfigError(
                f"data.encoding = {config.encoding!r} is not known.\n  Use utf-8, latin-1, cp1252, "
                "utf-16 or another that Python has."
            ) from None

    @classmethod
    def open(cls, config: TextConfig, cache: Path) -> "Files":
        assert config.path is not None  # `check` saw to it
        return Files(tuple(find_files(config.path)), config.column, config.encoding)

    @classmethod
    def mixture_settings(cls, argument: str) -> dict[str, Any]:
        return {"path": argument}

    @classmethod
    def language_configs(cls, config: TextConfig, cache: Path) -> Mapping[str, TextConfig]:
        """What LANG/ and LANG.txt (.jsonl, .parquet, compressed) in the folder hold, by code."""
        assert config.path is not None
        root = Path(config.path).expanduser()
        if not root.is_dir():
            raise DataError(
                f"{root} is no folder.\n  With data.languages, data.path names one that holds "
                "LANG/ or LANG.txt for each language."
            )
        paths: dict[str, Path] = {}
        for code, path in _paths_by_language(root, strict=ALL in config.languages):
            if code in paths:
                raise DataError(
                    f"{paths[code]} and {path} are the same language, {code}.\n"
                    "  Put all of its text into one folder."
                )
            paths[code] = path
        configs = {c: replace(config, languages=(), path=str(p)) for c, p in sorted(paths.items())}
        return choose_languages(config, configs, lambda code: _lack_of_text(configs[code], cache))

    @property
    def num_files(self) -> int:
        return len(self.paths)

    @property
    def num_characters(self) -> int:
        # Compressed text is about a third of its length.
        return sum(
            path.stat().st_size * (3 if path.suffix in COMPRESSIONS else 1) for path in self.paths
        )

    def documents(self, shard: int = 0, num_shards: int = 1) -> Iterator[str]:
        try:
            if len(self.paths) >= num_shards:
                yield from self._documents(self.paths[shard::num_shards])
            else:  # too few to share out: each shard reads all and keeps every n-th document
                yield from islice(self._documents(self.paths), shard, None, num_shards)
        except UndecodableError as error:
            raise self._all_undecodable(error) from error

    def _documents(self, paths: Sequence[Path]) -> Iterator[str]:
        for path in paths:
            yield from read_documents(path, self.column, self.encoding)

    def _all_undecodable(self, first: UndecodableError) -> DataError:
        """One error for all files that are not text in the encoding, with what mends them."""
        bad: list[Path] = []
        for path in tracked(self.paths, f"looking for files that are not {self.encoding}"):
            try:
                deque(characters(path, self.encoding), maxlen=0)
            except UndecodableError:
                bad.append(path)
            except DataError:  # is met when its turn comes
                continue
        if len(bad) == 1:
            return first
        names = " ".join(shlex.quote(str(path)) for path in bad[:MOST_NAMED])
        more = " ..." if len(bad) > MOST_NAMED else ""
        reason = str(first).partition("\n")[0]
        return DataError(
            f"{len(bad)} of {len(self.paths)} files are not {self.encoding}; the first: {reason}\n"
            f"  Were all written so, say --data.encoding latin-1, or whatever it is. Else convert "
            f'these:\n  for f in {names}{more}; do iconv -f latin1 -t utf-8 "$f" > "$f.new" && '
            'mv "$f.new" "$f"; done'
        )

    def fingerprint(self) -> str:
        encoding = () if self.encoding == "utf-8" else (self.encoding,)
        return digest(file_stats(self.paths), self.column, *encoding)


def find_files(pattern: str) -> list[Path]:
    """The text files that `pattern` (a file, folder or glob) names, sorted by path. Raises
    DataError if there is none, NoText if all of them are empty."""
    path = Path(pattern).expanduser()
    readable = ", ".join(FORMATS) + f" (also {', '.join(COMPRESSIONS)})"
    if path.is_file():
        if format_of(path) is None:
            raise DataError(f"{path} is not a text file by its name.\n  Readable are {readable}.")
        files = [path]
    elif path.is_dir():
        files = _text_files(path.rglob("*"))
        if not files:
            raise NoText(f"The folder {path} holds no text files.\n  Readable are {readable}.")
    elif glob.has_magic(pattern):
        files = _text_files(map(Path, glob.glob(str(path), recursive=True)))
        if not files:
            raise DataError(
                f"No text file matches {pattern!r}.\n  Readable are {readable}; "
                "quote the pattern so that the shell leaves it alone."
            )
    else:
        raise DataError(f"{path} does not exist.\n  Text is named by a file, a folder or a glob.")
    if not any(file.stat().st_size for file in files):
        empty = "is empty" if len(files) == 1 else f"and {len(files) - 1} more are empty"
        raise NoText(f"There is no text to train on: {files[0]} {empty}.\n  Name others.")
    return files


def _text_files(paths: Iterator[Path]) -> list[Path]:
    return sorted(path for path in paths if path.is_file() and format_of(path))


def _paths_by_language(root: Path, *, strict: bool) -> Iterator[tuple[str, Path]]:
    """(code, path) of what `root` holds; names that are no language are refused if `strict`."""
    for path in sorted(root.iterdir()):
        if path.name.startswith(".") or not (path.is_dir() or format_of(path)):
            continue
        name = path.name if path.is_dir() else path.name.partition(".")[0]
        try:
            yield normalise(name), path
        except DataError as error:
            if strict:
                raise DataError(f"{path}: {error}") from error


def _lack_of_text(config: TextConfig, cache: Path) -> str | None:
    """Why one language's files have too little text; None if they have enough. Reads no more than
    is needed to tell."""
    try:
        source = Files.open(config, cache)
    except NoText:
        return "it has no text"
    sentences = 0
    for document in source.documents():
        for line in document.splitlines():
            sentences += max(bool(line.strip()), len(line) // LINE_CHARACTERS)
        if sentences >= config.min_sentences:
            return None
    return too_few(config, sentences)
