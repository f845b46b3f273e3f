"""The source `python_docs`: English prose that every machine with this package has.

Docstrings, comments, C headers, READMEs and help topics of the standard library and of what
switchworks depends on, cleaned by `prose`, no paragraph twice. With the versions pinned in
constraints.txt it is the same text on every machine. Files are parsed, never imported. Extraction
takes some tens of seconds, so the cache keeps its result, one JSON string per line.
"""

import ast
import contextlib
import gc
import hashlib
import importlib.metadata
import multiprocessing
import os
import re
import signal
import sys
import sysconfig
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from packaging.requirements import Requirement

from switchworks.data.cache import digest, file_lock
from switchworks.data.sources.text_source import TextConfig, TextSource
from switchworks.disk import is_sealed, read_sealed_lines, sealed_bytes, write_sealed_lines
from switchworks.progress import Phase, phase

T = TypeVar("T")
Packages = dict[str, importlib.metadata.Distribution]

DOCS_ROOTS = (
    "torch", "numpy", "jaxtyping", "safetensors", "sentencepiece", "grain", "datasets",
    "zstandard", "tomli-w", "tyro", "rich", "tensorboard", "matplotlib", "scikit-learn", "scipy",
    "sacrebleu", "rouge-score",
)  # fmt: skip
"""What switchworks itself depends on: these are read, with everything they need in turn."""

_RULES = 1
"""Raised when the extraction changes, so that no older cache is taken for the new text."""

DOCUMENT_CHARACTERS = 2400
"""A document ends with the first paragraph that takes it past this length: some 500 tokens."""

_FILES_PER_JOB = 48

_SUFFIXES = (".py", ".pyi", ".pyx", ".pxd", ".h", ".hpp", ".cuh", ".md", ".rst")
_LEFT_OUT = re.compile(
    r"(^|/)(tests?|testing|_?vendor(ed)?|third_party|__pycache__|site-packages|dist-packages|"
    r"lib2to3|licenses?|_bundled)/|(^|/)(LICENSE|NOTICE|COPYING|topics\.py)",
    re.IGNORECASE,
)
_LEFT_OUT_PARAGRAPH = re.compile(
    r"(TODO|FIXME|XXX|HACK|NOLINT|NB)\b|.*\b(copyright|licen[sc]e|warranty|all rights reserved)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class PythonDocs(TextSource):
    """The embedded corpus, extracted into `cache` when first read by `workers` processes."""

    cache: Path
    workers: int = 0

    @classmethod
    def open(cls, config: TextConfig, cache: Path) -> "PythonDocs":
        return PythonDocs(cache, config.workers)

    @property
    def num_characters(self) -> int:
        return sealed_bytes(docs_file(self.cache, workers=self.workers))

    def documents(self, shard: int = 0, num_shards: int = 1) -> Iterator[str]:
        return read_sealed_lines(docs_file(self.cache, workers=self.workers), shard, num_shards)

    def fingerprint(self) -> str:
        return docs_fingerprint()


def docs_fingerprint() -> str:
    """Hexadecimal; identifies the text that `docs_file` has with what is installed now."""
    return digest(_RULES, DOCUMENT_CHARACTERS, sys.version_info[:3], versions(_packages()))


def docs_file(cache: Path, *, workers: int = 0) -> Path:
    """The file in `cache` that holds the corpus, one JSON string per document; made if missing.

    `workers`: processes that extract; 0 means one per core.
    """
    path = cache / f"python_docs-{docs_fingerprint()[:16]}.lines"
    if not is_sealed(path):
        with file_lock(path):
            if not is_sealed(path):  # by the process that had the lock before
                write_sealed_lines(path, extract_docs(_packages(), workers=workers))
    return path


def extract_docs(packages: Packages, *, workers: int = 0) -> Iterator[str]:
    """Documents from the standard library, then from `packages` in order of their names."""
    groups = [_help_topics(), _standard_library()]
    groups += [_package_files(packages[name]) for name in sorted(packages)]
    seen: set[bytes] = set()
    for texts in in_processes(extract_paragraphs, groups, workers):
        yield from join_documents(_unseen(texts, seen))


def in_processes(
    function: Callable[[list[str]], list[T]], groups: Iterable[Sequence[str]], workers: int = 0
) -> Iterator[Iterator[T]]:
    """What `function` makes of the files of each group, some files at a time, in their order."""
    count = workers or os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, initializer=_end_with_parent)
    try:
        # All work is queued at once: the pool starts its processes while it is given work.
        with _main_hidden():
            futures = [[pool.submit(function, job) for job in _jobs(group)] for group in groups]
        with phase("reading documentation", sum(map(len, futures))) as shown:
            for group in futures:
                yield chain.from_iterable(_results(group, shown))
    except BaseException:
        # Whoever interrupts waits for no file that is still being read.
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        raise
    pool.shutdown()


def _results(futures: Iterable[Future[list[T]]], shown: Phase) -> Iterator[list[T]]:
    for future in futures:
        yield future.result()
        shown.advance()


def _end_with_parent() -> None:
    """In a worker: leave Ctrl-C, which the terminal sends to all, to the parent, and end with it
    however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def source_files() -> list[str]:
    """The paths of all files that the corpus is taken from, in its order."""
    packages = _packages()
    groups = [_package_files(packages[name])[1:] for name in sorted(packages)]
    return [*_standard_library(), *(path for group in groups for path in group)]


def _packages() -> Packages:
    return installed_packages(DOCS_ROOTS)


# A job is a list of paths, or of texts that start with a line feed, which no path does.


def _standard_library() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return [str(root / file) for file in files if not _LEFT_OUT.search(file)]


def _package_files(package: importlib.metadata.Distribution) -> list[str]:
    """Its README, then its files in order of their names."""
    readme = package.metadata.json.get("description", "")
    files = sorted(str(file) for file in package.files or [])
    paths = [
        str(package.locate_file(file))
        for file in files
        if file.endswith(_SUFFIXES) and not _LEFT_OUT.search(file)
    ]
    return ["\n" + str(readme), *paths]


def _help_topics() -> list[str]:
    with contextlib.suppress(ImportError):
        from pydoc_data.topics import topics

        return ["\n" + topics[name] for name in sorted(topics)]
    return []


def _jobs(items: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(items), _FILES_PER_JOB):
        yield list(items[start : start + _FILES_PER_JOB])


def extract_paragraphs(items: list[str]) -> list[str]:
    """Every prose paragraph of the files (or texts) `items`, in order. Runs in a worker."""
    from switchworks.data.sources.prose import paragraphs

    # Syntax trees hold no cycles; looking for cycles takes half the parsing time.
    gc.disable()
    return [
        paragraph
        for item in items
        for text in ([item] if item.startswith("\n") else texts_of(Path(item)))
        for paragraph in paragraphs(text)
        if not _LEFT_OUT_PARAGRAPH.match(paragraph)
    ]


def texts_of(path: Path) -> Iterator[str]:
    """The documentation strings and comments of one file; nothing if it cannot be read."""
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    if path.suffix in {".md", ".rst"}:
        yield source
    elif path.suffix in {".py", ".pyi"}:
        yield from python_strings(source)
        yield from _comments(source, "#")
    else:
        yield from _comments(source, "#" if path.suffix in {".pyx", ".pxd"} else "//")
        for match in re.finditer(r"(?s)/\*(.*?)\*/|\"\"\"(.*?)\"\"\"", source):
            yield re.sub(r"(?m)^[ \t]*\*+ ?", "", match.group(1) or match.group(2) or "")


def python_strings(source: str) -> Iterator[str]:
    """Docstrings, and long string constants such as those given to `add_docstr`."""
    tree = parse_quietly(source)
    stack: list[ast.AST] = [] if tree is None else [tree]
    while stack:  # depth first; recursion would end at deeply nested expressions
        node = stack.pop()
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str) and len(node.value) >= 25:
                yield node.value
        elif isinstance(node, (ast.stmt, ast.mod, ast.ExceptHandler)):
            stack += reversed(list(_documented_parts(node)))
        elif isinstance(node, ast.Call):
            stack += reversed([argument for argument in node.args if _is_long(argument)])


def parse_quietly(source: str) -> ast.Module | None:
    """The syntax tree of a Python file, without warnings; None if it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a package's invalid escapes are not our concern
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _documented_parts(node: ast.AST) -> Iterator[ast.AST]:
    """The statements and the directly held strings inside `node`: all a docstring can be in."""
    for name in ("value", "body", "handlers", "orelse", "finalbody"):
        part = getattr(node, name, None)
        if isinstance(part, list):
            yield from part
        elif isinstance(part, ast.Call) or isinstance(node, ast.Expr) or _is_long(part):
            yield part  # type: ignore[misc]


def _is_long(node: object) -> bool:
    """Whether `node` is a string of several lines, which short messages and keys are not."""
    return (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and len(node.value) > 150
        and "\n" in node.value
    )


def _comments(source: str, mark: str) -> Iterator[str]:
    """Runs of whole-line comments that start with `mark`."""
    run: list[str] = []
    for line in source.split("\n"):
        bare = line.lstrip()
        if bare.startswith(mark):
            run.append(bare.lstrip("/#!<:").removeprefix(" "))
        elif run:
            yield "\n".join(run)
            run = []


def _unseen(texts: Iterable[str], seen: set[bytes]) -> Iterator[str]:
    for paragraph in texts:
        key = hashlib.blake2b(paragraph.encode(), digest_size=12).digest()
        if key not in seen:
            seen.add(key)
            yield paragraph


def join_documents(texts: Iterable[str]) -> Iterator[str]:
    """Paragraphs joined, by line feeds, into documents of about DOCUMENT_CHARACTERS."""
    document: list[str] = []
    length = 0
    for paragraph in texts:
        document.append(paragraph)
        length += len(paragraph)
        if length >= DOCUMENT_CHARACTERS:
            yield "\n".join(document)
            document, length = [], 0
    if document:
        yield "\n".join(document)


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """Keep processes that are spawned inside from importing the caller's main module. Spawned
    processes (forked ones are unsafe beside torch's threads) import it first. Ours need nothing
    from it; a script without a main guard would start pools in its own workers, and the command
    line would load torch in each."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def installed_packages(roots: Iterable[str]) -> Packages:
    """The installed distributions among `roots` and what they require, by normalised name."""
    available = {
        _normal(name): distribution
        for distribution in importlib.metadata.distributions()
        if (name := distribution.metadata["Name"])
    }
    packages: Packages = {}
    pending = [_normal(root) for root in roots]
    while pending:
        name = pending.pop()
        if name in packages or name not in available:
            continue
        packages[name] = available[name]
        for text in available[name].requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                pending.append(_normal(requirement.name))
    return packages


def versions(packages: Packages) -> list[tuple[str, str]]:
    """(name, version) of each, sorted: what an embedded corpus depends on."""
    return sorted((name, package.version) for name, package in packages.items())


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
