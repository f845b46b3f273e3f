"""Long work says how far it is: on a terminal in one line, elsewhere in a line now and then."""

import io
import re
import time

import pytest

from switchworks import progress
from switchworks.progress import phase, tracked


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.02)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.02)


def test_quick_work_says_nothing(capsys):
    assert list(tracked(range(3), "reading", 3)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_slow_work_says_its_share_and_the_time_left(impatient, capsys):
    with phase("reading", total=4) as shown:
        shown.advance()
        shown.say("a.txt")
        time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert all(re.fullmatch(r"reading a\.txt, 25%, 0:00:00 left", line) for line in lines)


def test_work_of_unknown_size_says_how_long_it_has_taken(impatient, capsys):
    with phase("training a tokenizer"):
        time.sleep(0.1)
    assert "training a tokenizer, 0:00:00 so far\n" in capsys.readouterr().err


def test_a_phase_within_another_is_silent(impatient, capsys):
    with phase("outer"), phase("inner"):
        time.sleep(0.1)
    assert "inner" not in capsys.readouterr().err


def test_ranks_other_than_the_main_one_are_silent(impatient, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with phase("reading"):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_one_line_that_is_gone_afterwards(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    with phase("reading", total=4, lines=False) as shown:
        assert shown.is_live
        shown.advance(2)
        shown.say("a.txt")
        time.sleep(0.7)
    written = terminal.getvalue()
    assert "reading" in written
    assert "50%" in written
    assert written.endswith("\x1b[2K")  # the line is erased
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    assert max(map(len, re.split(r"[\r\n]", plain))) <= 80
