"""The rules of the house that a program can hold: faces, words, sizes. Run as a script it prints
the figures."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, quantiles

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "switchworks"
MODULES = sorted(PACKAGE.rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

MOST_LINES = 39_400
"""Lines of the package, with blank ones, docstrings and imports: 27,000 as it was rearranged, and
since then `lab`, `package_docs`, what docs/interop.md lists, trust in files, `doctor`,
guards of a run, a run or checkpoint as a model, bounds of every reader, progress, pages of classes
and figures for papers, the engine, the server and experts on disk."""
MOST_CELL = 120
MEAN_LENGTH, P90_LENGTH = 10.5, 21
"""Lines of a function: its mean, and what a tenth of them exceed."""

OLD_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        widen _wide of_scores of_answers of_nats Rounded rounded widened rounding_of few_rows
        in_shares TokenGraph _twin is_of one_graph logits_only ask read_prompts decode_next
        start_decoding AttentionOutput visible hide HIDDEN BiasParts Inbox Pool Rules picks
        LOOKS_AHEAD nudge asked fed spared scale_to_bound ALONE by_first alone gathered depart
        arrive Flight take_off land copy_in sum_out Watch Sight verdict doing Tell first_values
        with_precision vocabulary_of first_state teach Taught taught_by _is_taught _learn
        Questions Answering to_be_asked Writing answer_lines Served badly data_of_run
        about_of Corpora HeldOut Prepared Turns Spread Side does who how of found own some one
        what
        """,
    )
)
"""Identifiers of the old dialect (HOUSE, section 4) that have a word of the field by now."""


def identifiers(source: str) -> Iterator[str]:
    """Every name that `source` defines, binds, uses or passes."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.alias(asname=str(name)):
                yield name
            case ast.keyword(arg=str(name)):
                yield name


def old_words(source: str) -> Counter[str]:
    return Counter(name for name in identifiers(source) if name in OLD_WORDS)


def past_a_face(source: str, package: str) -> list[str]:
    """What `source`, of that package, imports from inside another one."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            parts = node.module.split(".")
            if parts[0] == "switchworks" and len(parts) > 2 and parts[1] != package:
                found.append(node.module)
    return found


def wide_cells(page: str) -> list[str]:
    rows = [line.strip().strip("|") for line in page.splitlines() if line.startswith("|")]
    cells = [cell.strip() for row in rows for cell in re.split(r"(?<!\\)\|", row)]
    return [cell for cell in cells if len(cell) > MOST_CELL]


def function_lengths() -> list[int]:
    lengths = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                lengths.append(node.end_lineno - node.lineno + 1)
    return lengths


def package_lines() -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES)


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def test_packages_are_imported_through_their_faces():
    reached = {
        str(path.relative_to(ROOT)): found
        for path in MODULES
        if (found := past_a_face(path.read_text(encoding="utf-8"), package_of(path)))
    }
    assert not reached


@pytest.mark.parametrize(
    "source",
    [
        "from switchworks.data.rows.packing import pack",
        "from switchworks.data.config import DataConfig as D",
    ],
)
def test_an_import_past_a_face_is_seen(source):
    assert past_a_face(source, "training")
    assert not past_a_face(source, "data")


def test_no_old_word_is_an_identifier():
    left = sum((old_words(path.read_text(encoding="utf-8")) for path in MODULES), Counter())
    assert not left


def test_an_old_word_is_seen_wherever_it_stands():
    assert set(old_words("def how(of): found.own = f(what=1)")) == {
        "how",
        "of",
        "found",
        "own",
        "what",
    }


def test_the_package_is_no_longer_than_it_may_be():
    assert package_lines() <= MOST_LINES


def test_functions_stay_short():
    lengths = function_lengths()
    assert fmean(lengths) <= MEAN_LENGTH
    assert quantiles(lengths, n=10)[-1] <= P90_LENGTH


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_table_cell_is_too_long_to_read(page):
    assert not wide_cells(page.read_text(encoding="utf-8"))


def main() -> None:
    """Print the figures."""
    left = sum((old_words(path.read_text(encoding="utf-8")) for path in MODULES), Counter())
    lengths = function_lengths()
    print(f"{package_lines()} lines (at most {MOST_LINES})")
    print(f"functions: mean {fmean(lengths):.1f}, p90 {quantiles(lengths, n=10)[-1]:.0f} lines")
    print(f"{left.total()} identifiers of the old dialect: {dict(left.most_common(40))}")
    for page in PAGES:
        if cells := wide_cells(page.read_text(encoding="utf-8")):
            print(f"{page.name}: {len(cells)} cells over {MOST_CELL} characters")


if __name__ == "__main__":
    main()
