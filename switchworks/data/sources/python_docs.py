"""The embedded corpus `python_docs`: English prose that every machine with this package has.

It is taken from the standard library and from what switchworks depends on: docstrings and other
documentation strings, comments, C headers, READMEs and the topics of Python's own help, cleaned
by `prose`. No paragraph occurs twice. With the versions pinned in constraints.txt it is the same
text on every machine: tools that happen to be installed beside switchworks are not read.

Sources are parsed, never imported. Extraction takes some tens of seconds, so `python_docs` keeps
its result in the cache, one JSON string per line.
"""

import ast
import contextlib
import gc
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import sys
import sysconfig
import types
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from switchworks.data.sources.installed import Packages, installed, versions
from switchworks.data.sources.prose import paragraphs

ROOTS = (
    "torch", "numpy", "jaxtyping", "safetensors", "sentencepiece", "grain", "datasets",
    "zstandard", "tomli-w", "tyro", "rich", "tensorboard", "matplotlib", "scikit-learn", "scipy",
    "sacrebleu", "rouge-score",
)  # fmt: skip
"""What switchworks itself depends on: these are read, with everything they need in turn."""

RULES = 1
"""Raised when the extraction changes, so that no older cache is taken for the new text."""

DOCUMENT_CHARACTERS = 2400
"""A document ends with the first paragraph that takes it past this length: some 500 tokens."""

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


def fingerprint() -> str:
    """Hexadecimal; names the text that `python_docs` gives with what is installed now."""
    text = json.dumps([RULES, DOCUMENT_CHARACTERS, sys.version_info[:3], versions(_packages())])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def python_docs(cache: Path, *, workers: int = 0) -> Path:
    """The file in `cache` that holds the corpus, one JSON string per document; made if missing.

    `workers`: processes that extract; 0 means one per core.
    """
    path = cache / f"python_docs-{fingerprint()}.jsonl"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        for document in extract(_packages(), workers=workers):
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    return path


def extract(packages: Packages, *, workers: int = 0) -> Iterator[str]:
    """Documents from the standard library, then from `packages` in order of their names."""
    groups = [_help_topics(), _standard_library()]
    groups += [_package_files(packages[name]) for name in sorted(packages)]
    seen: set[bytes] = set()
    with ProcessPoolExecutor(
        workers or os.cpu_count() or 1, multiprocessing.get_context("spawn")
    ) as pool:
        # All work is queued at once: the pool starts its processes while it is given work.
        with main_hidden():
            jobs = [[pool.submit(_extract_files, job) for job in _jobs(group)] for group in groups]
        for futures in jobs:
            found = (paragraph for future in futures for paragraph in future.result())
            yield from _documents(_unseen(found, seen))


def _packages() -> Packages:
    """The installed distributions among ROOTS and what they require, by normalised name."""
    return installed(ROOTS)


def source_files() -> list[str]:
    """The paths of all files that the corpus is taken from, in its order."""
    packages = _packages()
    files = [_package_files(packages[name])[1:] for name in sorted(packages)]
    return [*_standard_library(), *(path for group in files for path in group)]


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


def _jobs(items: Sequence[str], size: int = 48) -> Iterator[list[str]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _extract_files(items: list[str]) -> list[str]:
    """Every prose paragraph of the files (or texts) `items`, in order. Runs in a worker."""
    # Syntax trees hold no cycles; looking for some while they grow takes half the parsing time.
    gc.disable()
    return [
        paragraph
        for item in items
        for text in ([item] if item.startswith("\n") else _texts_of(Path(item)))
        for paragraph in paragraphs(text)
        if not _LEFT_OUT_PARAGRAPH.match(paragraph)
    ]


def _texts_of(path: Path) -> Iterator[str]:
    """The documentation strings and comments of one file; nothing if it cannot be read."""
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    if path.suffix in {".md", ".rst"}:
        yield source
    elif path.suffix in {".py", ".pyi"}:
        yield from _python_strings(source)
        yield from _comments(source, "#")
    else:
        yield from _comments(source, "#" if path.suffix in {".pyx", ".pxd"} else "//")
        for match in re.finditer(r"(?s)/\*(.*?)\*/|\"\"\"(.*?)\"\"\"", source):
            yield re.sub(r"(?m)^[ \t]*\*+ ?", "", match.group(1) or match.group(2) or "")


def _python_strings(source: str) -> Iterator[str]:
    """Docstrings, and long string constants such as those given to `add_docstr`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a package's invalid escapes are not our concern
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str) and len(node.value) >= 25:
                yield node.value
        elif isinstance(node, (ast.stmt, ast.mod, ast.ExceptHandler)):
            waiting += reversed(list(_documented_parts(node)))
        elif isinstance(node, ast.Call):
            waiting += reversed([argument for argument in node.args if _is_long(argument)])


def _documented_parts(node: ast.AST) -> Iterator[ast.AST]:
    """The statements and the directly held strings inside `node`: all a docstring can be in."""
    for name in ("value", "body", "handlers", "orelse", "finalbody"):
        part = getattr(node, name, None)
        if isinstance(part, list):
            yield from part
        elif isinstance(part, ast.Call) or _is_docstring(node) or _is_long(part):
            yield part  # type: ignore[misc]


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


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


def _unseen(found: Iterable[str], seen: set[bytes]) -> Iterator[str]:
    for paragraph in found:
        digest = hashlib.blake2b(paragraph.encode(), digest_size=12).digest()
        if digest not in seen:
            seen.add(digest)
            yield paragraph


def _documents(found: Iterable[str]) -> Iterator[str]:
    """Paragraphs joined, by line feeds, into documents of about DOCUMENT_CHARACTERS."""
    document: list[str] = []
    length = 0
    for paragraph in found:
        document.append(paragraph)
        length += len(paragraph)
        if length >= DOCUMENT_CHARACTERS:
            yield "\n".join(document)
            document, length = [], 0
    if document:
        yield "\n".join(document)


@contextlib.contextmanager
def main_hidden() -> Iterator[None]:
    """Processes started inside do not run the caller's main program again.

    Started processes (rather than forked ones, unsafe beside torch's threads) import the main
    module first. Ours need nothing from it; a script without a main guard would start pools in
    its own workers, and the command line would load torch in each. So it is hidden from them.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
