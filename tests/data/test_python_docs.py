"""The embedded corpus: prose in, code and markup out, the same text every time."""

import importlib
import re
import subprocess
import sys
import textwrap

import pytest

from switchworks.data.sources import python_docs
from switchworks.data.sources.prose import is_english, paragraphs
from switchworks.disk import read_sealed_lines

DOCSTRING = """
Return the cat that sat on the given mat.

    cat(mat, *, fur=None) -> Cat

A cat is *always* found by :func:`~cats.find_cat`, or by ``look``, as the
`manual <https://example.org/cats>`_ says [1]_. See :class:`Cat <cats.Cat>` for more.

.. versionadded:: 1.2
   The mat may also be a rug, if it is large enough.

.. code-block:: python

   cat = sit(mat)  # This is a comment that reads like a sentence of English.

Parameters
----------
mat : Mat, optional
    The mat on which the cat should be sitting.
fur (str): The colour of the fur that the cat is wearing.
:param name: The name of the cat, which it does not listen to.

- Cats that are on the mat are always returned first,
  and they are in no other order.
- Cats that have left the mat are not to be found here.

Examples
--------
>>> cat("mat")
'It is the cat that sat on the mat.'

The cat is then woken like this::

    cat.wake("It is time for the cat to get up and go.")

======  ==================================
column  It is a table and not a sentence.
======  ==================================

Look at https://example.org to see what the cats are doing.
"""

PROSE = [
    "Return the cat that sat on the given mat.",
    "A cat is always found by cats.find_cat, or by look, as the manual says. See Cat for more.",
    "The mat may also be a rug, if it is large enough.",
    "The mat on which the cat should be sitting.",
    "The colour of the fur that the cat is wearing.",
    "The name of the cat, which it does not listen to.",
    "Cats that are on the mat are always returned first, and they are in no other order.",
    "Cats that have left the mat are not to be found here.",
    "The cat is then woken like this:",
]


def test_prose_is_kept_and_code_tables_and_markup_are_not():
    assert list(paragraphs(DOCSTRING)) == PROSE


def test_markdown_loses_its_fences_links_and_headings():
    text = """
    # A heading that is not a sentence but looks as if it were one.

    This is the [first](https://example.org) of the **cats** &amp; it is `asleep` &mdash; still, as
    it was when we last had a look at it.

    ```python
    # This is a comment that is in the code of the file.
    ```
    """
    assert list(paragraphs(text)) == [
        "This is the first of the cats & it is asleep \u2014 still, as it was when we last had a "
        "look at it."
    ]


@pytest.mark.parametrize(
    "text",
    [
        "x = f(a) + g(b) if c else d(e, f, g)",
        "Returns.",
        "{'a': 1, 'b': 2} is a dict of the {'c': 3} kind in <tag> and [x] for $y.",
        "and this is the end of a sentence that began elsewhere.",
        "This is a sentence that has no end",
        "Ceci est une phrase fran\u00e7aise qui ne contient pas de mots anglais du tout.",
    ],
)
def test_what_does_not_read_like_english_is_left_out(text):
    assert not is_english(text)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed distribution of three files, on the path."""
    files = {
        "cats/__init__.py": '''
            """This package is about cats and what they do."""
            # A comment says why it is so,
            # and it may go on to the next line.
            add_docs("""Add a cat to the ones that are there already, which is what the
            function that this string is given to would do if it were ever called, and it is not
            called in this test.""")
            def f():
                "This is a string that is the docstring of a function."
                raise SystemExit("This module is imported, and it should never be.")
            raise SystemExit
        ''',
        "cats/again.py": '''
            """This package is about cats and what they do."""
        ''',
        "cats/tests/test_cats.py": '"""These are the tests, which are not to be read."""',
        "cats/broken.py": '"""This file is not Python at all, so it is not read.""" (',
        "cats/cats.h": "/// This is the header of the cats, and it is in C++.\nint cats();\n",
        "cats-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: cats\nVersion: 1.0\n\n"
        "The cats of this project are described in the text that follows.\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    record = tmp_path / "cats-1.0.dist-info" / "RECORD"
    record.write_text("".join(f"{name},,\n" for name in files))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(python_docs, "DOCS_ROOTS", ("Cats",))
    monkeypatch.setattr(python_docs, "_standard_library", list)
    monkeypatch.setattr(python_docs, "_help_topics", list)
    return tmp_path


CATS = [
    "The cats of this project are described in the text that follows.",
    "This package is about cats and what they do.",
    "Add a cat to the ones that are there already, which is what the function that this string is "
    "given to would do if it were ever called, and it is not called in this test.",
    "This is a string that is the docstring of a function.",
    "A comment says why it is so, and it may go on to the next line.",
    "This is the header of the cats, and it is in C++.",
]


def test_a_package_gives_its_readme_docstrings_and_comments_once_and_runs_no_code(
    package, tmp_path
):
    path = python_docs.docs_file(tmp_path / "cache", workers=1)
    (document,) = read_sealed_lines(path)
    assert document.split("\n") == CATS


def test_the_second_call_reads_the_cache(package, tmp_path, monkeypatch):
    first = python_docs.docs_file(tmp_path / "cache", workers=1)
    monkeypatch.setattr(python_docs, "extract_docs", None)
    assert python_docs.docs_file(tmp_path / "cache") == first
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".lines", ".lock"]


def test_another_version_of_a_package_is_another_text(package):
    before = python_docs.docs_fingerprint()
    metadata = package / "cats-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 1.0", "Version: 1.1"))
    importlib.invalidate_caches()
    assert python_docs.docs_fingerprint() != before


def test_documents_are_closed_at_the_first_paragraph_past_their_length():
    found = [f"{n} " + "x" * 1000 for n in range(7)]
    documents = list(python_docs.join_documents(found))
    assert [document.count("\n") + 1 for document in documents] == [3, 3, 1]
    assert "\n".join(documents).split("\n") == found


def test_what_switchworks_depends_on_is_read_and_test_tools_are_not():
    packages = python_docs._packages()
    assert {"torch", "numpy", "sympy", "datasets", "pandas"} <= packages.keys()
    assert not {"pytest", "ruff", "hypothesis", "transformers"} & packages.keys()


def test_a_script_without_a_main_guard_may_extract(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from switchworks.data.sources import python_docs\n"
        "python_docs._standard_library = list\n"
        "print(sum(1 for _ in python_docs.extract_docs({}, workers=2)))\n"
    )
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, env=_with_path()
    )
    assert int(result.stdout) > 20  # the topics of Python's help alone


def _with_path() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_python_help_is_clean_english_without_entities():
    texts = python_docs._help_topics()
    found = [paragraph for text in texts for paragraph in paragraphs(text)]
    assert len(found) > 500
    assert not [p for p in found if re.search(r"&\w+;|::|>>>|^\.\. |`", p)]
