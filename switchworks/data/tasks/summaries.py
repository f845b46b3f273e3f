"""Summarisation: CNN/DailyMail, XSum, and a docstring's body to its first line.

The last is made of the embedded corpus, and has its splits: no pre-trained model has seen an
answer.
"""

import ast
import gc
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path

from switchworks.data.sources import python_docs
from switchworks.data.sources.prose import paragraphs
from switchworks.data.sources.text_source import SPLIT_RULES, is_validation
from switchworks.data.tasks.sources import Made, Places, Record
from switchworks.data.tasks.task import Example, Task, hub_task, text_in
from switchworks.disk import is_sealed, read_sealed_lines, write_sealed_lines

SHORTEST_BODY = 80
"""Characters. A shorter body has hardly more than the summary."""


def summarise(record: Record, text: str, summary: str) -> Example:
    """T5's form: "summarize: " and the column `text`, to the column `summary`."""
    return Example(inputs=f"summarize: {text_in(record, text)}", target=record[summary])


def _summaries(split: str, places: Places) -> Iterator[Record]:
    records = read_sealed_lines(_table(places))
    return (record for record in records if record["split"] == split)


def _version(places: Places) -> str:
    """Identifies the corpus, and which of its documents are held out."""
    return f"{python_docs.docs_fingerprint()} {SPLIT_RULES} {places.validation_share}"


def _table(places: Places) -> Path:
    """All records, one JSON object per line; made if missing, a minute or two of work."""
    key = f"{python_docs.docs_fingerprint()[:16]}-{SPLIT_RULES}-{places.validation_share:g}"
    path = places.cache / f"docstring_summary-{key}.lines"
    if not is_sealed(path):
        held_out = _held_out(places)
        records = (
            {"split": split, "summary": summary, "body": "\n".join(body)}
            for summary, body in _pairs()
            if (split := split_of([summary, *body], held_out)) is not None
        )
        write_sealed_lines(path, records)
    return path


def split_of(parts: Iterable[str], held_out: Mapping[str, bool]) -> str | None:
    """The split of a docstring of these paragraphs: validation if all are held out from
    pre-training, train if none is. None if they are mixed, or if one is not in the corpus."""
    sides = {held_out.get(part) for part in parts}
    if sides == {True}:
        return "validation"
    return "train" if sides == {False} else None


def _held_out(places: Places) -> dict[str, bool]:
    """Every paragraph of the embedded corpus, and whether its document is held out."""
    held_out: dict[str, bool] = {}
    for document in read_sealed_lines(python_docs.docs_file(places.cache)):
        side = is_validation(document, places.validation_share)
        held_out.update((paragraph, side) for paragraph in document.split("\n"))
    return held_out


def _pairs() -> Iterator[tuple[str, list[str]]]:
    """(summary, paragraphs of the body) of every docstring, each summary and each body once."""
    seen: set[str] = set()
    files = [path for path in python_docs.source_files() if path.endswith((".py", ".pyi"))]
    for summary, body in chain.from_iterable(python_docs.in_processes(_pairs_of, [files])):
        text = "\n".join(body)
        if summary not in seen and text not in seen:
            seen.update((summary, text))
            yield summary, body


def _pairs_of(files: list[str]) -> list[tuple[str, list[str]]]:
    """The pairs of `files`, in order. Runs in a worker."""
    gc.disable()  # as in python_docs: syntax trees hold no cycles
    return [
        pair
        for file in files
        for docstring in _docstrings(Path(file))
        if (pair := split_docstring(docstring)) is not None
    ]


def split_docstring(docstring: str) -> tuple[str, list[str]] | None:
    """(summary, paragraphs of the body), cleaned; None if there is no prose for one of them."""
    first, _, rest = docstring.strip().partition("\n\n")
    summary, body = list(paragraphs(first)), list(paragraphs(rest))
    if len(summary) != 1 or sum(map(len, body)) < SHORTEST_BODY:
        return None
    return summary[0], body


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = python_docs.parse_quietly(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return
    for node in ast.walk(tree or ast.Module([], [])):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


_cnn_dailymail = partial(summarise, text="article", summary="highlights")
_xsum = partial(summarise, text="document", summary="summary")

SUMMARIES = (
    hub_task("cnn_dailymail", "abisee/cnn_dailymail:3.0.0", _cnn_dailymail, metrics="rouge"),
    hub_task("xsum", "EdinburghNLP/xsum", _xsum, metrics="rouge"),
    Task(
        name="docstring_summary",
        source=Made(_summaries, _version),
        to_text=partial(summarise, text="body", summary="summary"),
        metrics=("rouge",),
    ),
)
