"""The help of each verb, kept as a file: what a user reads changes on purpose.

`python tests/cli/test_help.py` writes the files anew.
"""

import contextlib
import io
import os
import re
from pathlib import Path

import pytest

from switchworks.cli.main import VERBS, main

KEPT = Path(__file__).parents[1] / "golden" / "help"
PAGES = {verb: [verb, "--help"] for verb in VERBS} | {
    "switchworks": ["--help"],
    "train quickstart": ["train", "quickstart", "--help"],
    "train quickstart, all": ["train", "quickstart", "--help-all"],
}


def shown(words: list[str]) -> str:
    """What `switchworks WORDS` prints on a terminal of 80 columns, without colours."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main(words)
    return re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue())


@pytest.mark.parametrize("name", PAGES)
def test_the_help_is_the_one_that_was_read(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(PAGES[name])
    assert text == (KEPT / f"{name}.txt").read_text(encoding="utf-8"), (
        "python tests/cli/test_help.py writes it anew: read it then"
    )
    assert max(map(len, text.splitlines())) <= 80
    assert "noqa" not in text  # comments of the code, which become help where a docstring lacks


def test_the_help_of_a_recipe_begins_with_what_people_change():
    short, whole = (KEPT / f"train quickstart{end}.txt" for end in ("", ", all"))
    assert short.read_text().count("\n  --") <= 30
    assert whole.read_text().count("\n  --") > 120


if __name__ == "__main__":
    os.environ["COLUMNS"] = "80"
    KEPT.mkdir(parents=True, exist_ok=True)
    for name, words in PAGES.items():
        (KEPT / f"{name}.txt").write_text(shown(words), encoding="utf-8")
