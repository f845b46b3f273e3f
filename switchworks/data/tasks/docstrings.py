"""Summarise a docstring's body to its first line: a task that every installation has data for.

The text is that of the embedded corpus, and so are the splits: an example is held out only if all
its paragraphs are in documents that are held out from pre-training, and trained on only if none
is. What lies across the border is left out, so that no pre-trained model has seen an answer.
"""

import ast
import gc
import json
import multiprocessing
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from switchworks.data.sources import python_docs
from switchworks.data.sources.documents import is_validation
from switchworks.data.sources.prose import paragraphs
from switchworks.data.tasks.sources import Made, Places, Record
from switchworks.data.tasks.task import Example, Task

SHORTEST_BODY = 80
"""Characters. Less is hardly more than the summary says."""


def summaries(split: str, places: Places) -> Iterator[Record]:
    """The records of a split: `body` and `summary`."""
    path = _table(places)
    with path.open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            if record["split"] == split:
                yield record


def known_by(places: Places) -> str:
    """The corpus, and which of its documents are held out."""
    return f"{python_docs.fingerprint()} {places.validation_share}"


def _table(places: Places) -> Path:
    """All records, one JSON object per line; made if missing, a minute or two of work."""
    name = f"docstring_summary-{python_docs.fingerprint()}-{places.validation_share:g}.jsonl"
    path = places.cache / name
    if path.exists():
        return path
    held_out = _held_out(places)
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        for summary, body in _pairs():
            split = split_of([summary, *body], held_out)
            if split is not None:
                record = {"split": split, "summary": summary, "body": "\n".join(body)}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    return path


def split_of(parts: Iterable[str], held_out: Mapping[str, bool]) -> str | None:
    """Where a docstring of these paragraphs belongs: validation if all are held out from
    pre-training, train if none is. None if they are mixed, or if one is not in the corpus."""
    found = {held_out.get(part) for part in parts}
    if found == {True}:
        return "validation"
    return "train" if found == {False} else None


def _held_out(places: Places) -> dict[str, bool]:
    """Every paragraph of the embedded corpus, and whether its document is held out."""
    found: dict[str, bool] = {}
    with python_docs.python_docs(places.cache).open(encoding="utf-8") as file:
        for line in file:
            document = json.loads(line)
            held = is_validation(document, places.validation_share)
            found.update((paragraph, held) for paragraph in document.split("\n"))
    return found


def _pairs() -> Iterator[tuple[str, list[str]]]:
    """(summary, paragraphs of the body) of every docstring, each summary and each body once."""
    seen: set[str] = set()
    files = [path for path in python_docs.source_files() if path.endswith((".py", ".pyi"))]
    jobs = [files[start : start + 48] for start in range(0, len(files), 48)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count() or 1, context) as pool:
        with python_docs.main_hidden():
            futures = [pool.submit(_pairs_of, job) for job in jobs]
        for future in futures:
            for summary, body in future.result():
                text = "\n".join(body)
                if summary not in seen and text not in seen:
                    seen.update((summary, text))
                    yield summary, body


def _pairs_of(files: list[str]) -> list[tuple[str, list[str]]]:
    """The pairs of some files, in order. Runs in a worker."""
    gc.disable()  # as in python_docs: syntax trees hold no cycles
    return [
        parts
        for file in files
        for docstring in _docstrings(Path(file))
        if (parts := split_docstring(docstring)) is not None
    ]


def split_docstring(docstring: str) -> tuple[str, list[str]] | None:
    """(summary, paragraphs of the body), cleaned; None if there is no prose for one of them."""
    first, _, rest = docstring.strip().partition("\n\n")
    summary, body = list(paragraphs(first)), list(paragraphs(rest))
    if len(summary) != 1 or sum(map(len, body)) < SHORTEST_BODY:
        return None
    return summary[0], body


def _docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a file; none if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a package's invalid escapes are not our concern
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def to_text(record: Record) -> Example:
    """As T5 writes summarisation."""
    return Example(inputs=f"summarize: {record['body']}", target=record["summary"])


TASKS = (
    Task(
        name="docstring_summary",
        source=Made(summaries, known_by),
        to_text=to_text,
        metrics=("rouge",),
    ),
)
