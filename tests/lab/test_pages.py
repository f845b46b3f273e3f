"""What results say, and the pages made of them."""

from html.parser import HTMLParser
from typing import Any

import pytest

from switchworks.cli.main import main
from switchworks.disk import write_json
from switchworks.lab import write_pages
from switchworks.lab.analysis import compare


def results(sparse: list[float], dense: list[float], **more: Any) -> dict[str, Any]:
    """Of two arms: the loss of each seed after 100 steps; after 50 it is 0.5 higher, and after 200
    0.5 lower."""
    runs = [
        {
            "arm": arm,
            "seed": seed,
            "steps": steps,
            "loss": loss + change,
            "tokens": 1000 * steps,
            "machine": "a machine",
            "commit": "0123456789abcdef",
        }
        for arm, found in (("dense", dense), ("sparse", sparse))
        for seed, loss in enumerate(found)
        for steps, change in ((50, 0.5), (100, 0.0), (200, -0.5))
    ]
    arms = [{"name": "dense"}, {"name": "sparse", "expected": more.pop("expected", "better")}]
    about = {"study": "small", "question": "Is it <better>?", "paper": "Figure 0: yes"}
    return {**about, "arms": arms, "steps": [50, 100, 200], "runs": runs, **more}


def test_a_side_that_is_half_a_nat_ahead_everywhere_needs_half_the_steps():
    dense, sparse = compare(results([3.5, 3.6, 3.4], [4.0, 4.1, 3.9]))
    assert (dense.gain, dense.factors) == (None, {})
    assert sparse.gain == pytest.approx((0.5, 0.5, 0.5, 3))
    times, bound = sparse.factors[200]
    assert times == pytest.approx((2.0, 2.0, 2.0, 3))
    assert not bound
    assert sparse.loss.mean == pytest.approx(3.0)


def test_a_factor_below_the_shortest_run_is_a_bound():
    (_, sparse) = compare(results([2.0], [4.0]))
    assert sparse.factors[200] == (pytest.approx((4.0, 4.0, 4.0, 1)), True)


@pytest.mark.parametrize(
    ("sparse", "expected", "verdict"),
    [
        ([3.5, 3.6, 3.4], "better", "same direction as in the paper"),
        ([4.5, 4.6, 4.4], "better", "different: worse here"),
        ([4.5, 4.6, 4.4], "worse", "same direction as in the paper"),
        ([4.001, 4.102, 3.9], "the same", "same direction as in the paper"),
        ([3.5, 4.6, 4.4], "better", "not measurable here: the spread of 3 seeds is too large"),
    ],
)
def test_a_verdict_holds_the_interval_of_the_gain_against_the_paper(sparse, expected, verdict):
    (_, found) = compare(results(sparse, [4.0, 4.1, 3.9], expected=expected))
    assert found.conclusion() == verdict


def test_one_seed_has_no_verdict_but_says_what_would_give_one():
    (_, found) = compare(results([3.0], [4.0]))
    assert found.conclusion().startswith("one seed")


def test_seconds_are_the_steps_times_the_rates():
    rates = {"dense": 1000.0, "sparse": 800.0}
    (_, found) = compare(results([3.5], [4.0], tokens_per_second=rates))
    assert found.per_second == pytest.approx(0.8)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)

    def handle_data(self, data):
        self.text += data


def test_the_pages_have_every_study_with_its_picture_and_table(tmp_path):
    found = results([3.5, 3.6], [4.0, 4.1], tokens_per_second={"dense": 1000.0, "sparse": 800.0})
    write_pages([found], tmp_path / "results.md", tmp_path / "results.html")
    text = (tmp_path / "results.md").read_text("utf-8")
    row = "| sparse | 3.050 (2.415 to 3.685) | 0.500 (0.500 to 0.500) | 2.00 (2.00 to 2.00) | 1.60"
    assert row in text
    assert "![Is it <better>?](results-small.png)" in text
    assert "`switchworks lab small`" in text
    assert (tmp_path / "results-small.png").read_bytes().startswith(b"\x89PNG")
    page = Tags()
    page.feed((tmp_path / "results.html").read_text("utf-8"))
    assert "better" not in page.seen
    assert (page.seen.count("img"), page.seen.count("tr")) == (1, 5)
    assert "| Figure 0 | small | sparse | same direction as in the paper |" in text
    assert "Is it <better>?" in page.text


def test_a_study_of_one_length_has_no_column_for_factors(tmp_path):
    found = results([3.5, 3.6], [4.0, 4.1])
    found["runs"] = [run for run in found["runs"] if run["steps"] == 200]
    write_pages([found | {"steps": [200]}], tmp_path / "results.md", tmp_path / "results.html")
    text = (tmp_path / "results.md").read_text("utf-8")
    assert "|  | loss (nats) | ahead by | verdict |" in text
    assert (tmp_path / "results-small.png").stat().st_size > 1000


def test_the_command_writes_them(tmp_path, capsys):
    write_json(tmp_path / "small.json", results([3.5], [4.0]))
    words = ["--results", str(tmp_path), "--page", str(tmp_path / "results.md")]
    assert main(["lab", "report", *words]) == 0
    assert str(tmp_path / "results.html") in capsys.readouterr().out
    assert main(["lab", "report", "--results", str(tmp_path / "none")]) == 2
    assert "has no results" in capsys.readouterr().err
