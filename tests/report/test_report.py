"""The report: what it reads, what it computes, and what a reader finds on the page."""

import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import tomli_w

from switchworks.cli.parsing import parse_flags
from switchworks.cli.report import ReportFlags
from switchworks.config import DataError
from switchworks.report import write_report
from switchworks.report.charts import Chart, Curve, line_chart, smooth
from switchworks.report.figures import compact, duration
from switchworks.report.load_chart import LoadMap, load_chart
from switchworks.report.runs import read_run, when_reached


def a_run(
    path: Path,
    lines: Sequence[Mapping[str, Any]],
    *,
    settings: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
    torn: str = "",
) -> Path:
    path.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines) + torn
    (path / "metrics.jsonl").write_text(text, encoding="utf-8")
    if settings is not None:
        (path / "experiment.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
    if about is not None:
        (path / "about.json").write_text(json.dumps(about), encoding="utf-8")
    if samples:
        text = "".join(json.dumps(sample) + "\n" for sample in samples)
        (path / "samples.jsonl").write_text(text, encoding="utf-8")
    return path


def training(step: int, loss: float = 5.0, **more: Any) -> dict[str, Any]:
    return {"step": step, "tokens": step * 100, "seconds": step * 2.0, "train/loss": loss} | more


def validation(step: int, loss: float, seconds: float = 0.0) -> dict[str, Any]:
    return {"step": step, "tokens": step * 100, "seconds": seconds or step * 2.0, "val/loss": loss}


def routed(step: int, shares: Sequence[float], dropped: float = 0.0) -> dict[str, Any]:
    return training(step) | {
        "train/balance": 1.0,
        "train/dropped": dropped,
        "train/experts_in_use": 2.0,
        "load/encoder.1": list(shares),
        "dropped/encoder.1": dropped,
    }


def html_of(*runs: Path) -> str:
    return write_report(runs).read_text(encoding="utf-8")


def tile(html: str, name: str) -> str:
    found = re.search(rf"<div>{re.escape(name)}</div><b>(.*?)</b>", html)
    assert found, f"no tile {name}"
    return found[1]


class Balanced(HTMLParser):
    """Fails on a tag that closes another; keeps every address the page mentions."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(html: str) -> Balanced:
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


# What is read


def test_a_torn_last_line_is_left_out_and_said(tmp_path):
    run = a_run(tmp_path / "r", [training(1), training(2)], torn='{"step": 3, "tra')
    assert [row["step"] for row in read_run(run).rows] == [1, 2]
    assert "metrics.jsonl: 1 line was unreadable" in html_of(run)


def test_of_a_step_noted_twice_the_later_line_wins(tmp_path):
    lines = [training(1, 9.0), training(2, 8.0), training(2, 7.0), training(3, 6.0)]
    steps, losses = read_run(a_run(tmp_path / "r", lines)).series("train/loss")
    assert (steps.tolist(), losses.tolist()) == ([1, 2, 3], [9, 7, 6])


def test_what_was_noted_after_the_checkpoint_a_run_resumed_from_is_forgotten(tmp_path):
    lines = [training(1), training(2), training(3), training(4), training(2)]
    assert [row["step"] for row in read_run(a_run(tmp_path / "r", lines)).rows] == [1, 2]


def test_the_training_and_the_validation_line_of_a_step_are_joined(tmp_path):
    run = read_run(a_run(tmp_path / "r", [training(5, 4.0), validation(5, 4.5)]))
    assert (run.last("train/loss"), run.last("val/loss")) == (4.0, 4.5)


def test_a_line_separator_inside_a_sample_does_not_tear_it(tmp_path):
    sample = {"step": 1, "inputs": "a\u2028b <extra_id_0>", "truth": "", "prediction": ""}
    run = a_run(tmp_path / "r", [training(1)])
    (run / "samples.jsonl").write_text(json.dumps(sample, ensure_ascii=False), encoding="utf-8")
    assert [s.inputs for s in read_run(run).samples] == ["a\u2028b <extra_id_0>"]


@pytest.mark.parametrize("what", ["has no metrics.jsonl", "is no directory"])
def test_a_directory_that_is_no_run_is_refused_by_name(tmp_path, what):
    path = tmp_path / "elsewhere"
    if what == "has no metrics.jsonl":
        path.mkdir()
    with pytest.raises(DataError, match=f"elsewhere is not a run directory: it {what}"):
        write_report([path])


def test_torn_settings_are_said_and_do_not_stop_the_report(tmp_path):
    run = a_run(tmp_path / "r", [training(1)])
    (run / "experiment.toml").write_text("name = ", encoding="utf-8")
    (run / "about.json").write_text('{"parameters": 1', encoding="utf-8")
    html = html_of(run)
    assert "experiment.toml could not be read" in html
    assert "about.json could not be read" in html


# What is computed


def test_the_tiles_hold_the_figures_of_the_metrics(tmp_path):
    lines = [
        training(s, tokens_per_second=float(v)) for s, v in ((10, 900), (20, 1500), (30, 1400))
    ]
    lines.append(validation(30, 2.0, seconds=3723.0))
    about = {"parameters": 40_900_000, "active_parameters": 9_420_000}
    html = html_of(a_run(tmp_path / "r", lines, about=about))
    assert tile(html, "Validation loss") == "2.000"
    assert tile(html, "Validation perplexity") == "7.389"  # e squared
    assert tile(html, "Steps") == "30"
    assert tile(html, "Tokens") == "3,000"
    assert tile(html, "Training time") == "1 h 2 min"
    assert tile(html, "Tokens per second") == "1,400"
    assert tile(html, "Parameters") == "40.9 M"
    assert "9.42 M used per token" in html


def test_the_dropped_share_is_the_mean_of_the_last_tenth(tmp_path):
    lines = [routed(step, [0.5, 0.5], dropped=0.9) for step in range(1, 19)]
    lines += [routed(19, [0.5, 0.5], dropped=0.01), routed(20, [0.5, 0.5], dropped=0.03)]
    html = html_of(a_run(tmp_path / "r", lines))
    assert tile(html, "Dropped tokens") == "2.00 %"
    assert tile(html, "Experts in use") == "2.0 of 2"


def test_the_speed_up_is_the_dense_runs_steps_over_the_steps_to_its_final_loss(tmp_path):
    dense = [validation(s, loss, s * 1.0) for s, loss in ((100, 6.0), (200, 5.0), (300, 4.0))]
    sparse = [routed(50, [0.5, 0.5])]
    sparse += [validation(s, loss, s * 1.5) for s, loss in ((100, 5.0), (200, 3.0), (300, 2.9))]
    runs = [a_run(tmp_path / "switch", sparse), a_run(tmp_path / "dense", dense)]
    html = html_of(*runs)
    # 4.0 lies half-way between steps 100 and 200, that is, at step 150 and 225 seconds
    assert tile(html, "Speed-up in steps, switch") == "2.00x"
    assert tile(html, "Speed-up in time, switch") == "1.33x"
    assert "<th>Steps to a loss of 4.000</th><td>150</td><td>300</td>" in html
    assert "<th>Time to a loss of 4.000</th><td>3 min 45 s</td><td>5 min 0 s</td>" in html


def test_a_run_that_never_gets_there_has_no_speed_up(tmp_path):
    dense = a_run(tmp_path / "dense", [validation(100, 4.0)])
    worse = a_run(tmp_path / "worse", [routed(50, [0.5, 0.5]), validation(100, 4.1)])
    html = html_of(dense, worse)
    assert "<th>Speed-up in steps</th><td>1.00x</td><td>not reached</td>" in html
    assert "Speed-up in steps, worse" not in html
    assert when_reached(read_run(worse), 4.0) is None


def test_smoothing_keeps_a_straight_beginning_straight():
    y = np.arange(200.0)
    assert np.allclose(smooth(y)[:190], y[:190])


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (59.6, "1 min 0 s"),
        (352, "5 min 52 s"),
        (7260, "2 h 1 min"),
        (90000, "1 d 1 h"),
    ],
)
def test_durations_are_said_in_two_units(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("count", "said"),
    [(999_000, "999,000"), (1e6, "1.00 M"), (999_900_000, "1.00 B"), (395e9, "395 B")],
)
def test_counts_keep_three_digits(count, said):
    assert compact(count) == said


# What the page shows


def test_the_page_loads_nothing_from_elsewhere(tmp_path):
    html = html_of(a_run(tmp_path / "r", [routed(s, [0.2, 0.8]) for s in range(1, 9)]))
    addresses = parsed(html).addresses
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    assert "default-src 'none'" in html
    assert "url(" not in html
    assert "@import" not in html


def test_text_that_looks_like_html_stays_text(tmp_path):
    evil = "<b onclick='x'>&\"</b><video>"
    hole = "<extra_id_0>"
    run = a_run(
        tmp_path / "r",
        [{**training(s), f"load/{evil}": [0.5, 0.5]} for s in (1, 2)],
        settings={"name": evil, evil: {evil: [evil]}},
        about=dict.fromkeys(("command", "machine", "text", "torch", "started"), evil),
        samples=[
            {
                "step": 1,
                "inputs": evil + hole,
                "truth": hole + evil,
                "prediction": hole + evil + "!",
            }
        ],
    )
    for runs in ([run], [run, a_run(tmp_path / evil.replace("/", ""), [training(1)])]):
        html = write_report(runs, tmp_path / "out.html").read_text(encoding="utf-8")
        assert "video" not in parsed(html).tags
        assert "<b onclick" not in html
        assert "&lt;video&gt;" in html


def test_a_dense_run_has_no_routing_sections(tmp_path):
    dense = html_of(a_run(tmp_path / "dense", [training(s) for s in range(1, 9)]))
    sparse = html_of(a_run(tmp_path / "sparse", [routed(s, [0.5, 0.5]) for s in range(1, 9)]))
    for words in ("How it routed", "Load of the experts", "Dropped tokens", "Experts in use"):
        assert words not in dense
        assert words in sparse


def test_empty_metrics_give_a_page_that_says_so(tmp_path):
    html = html_of(a_run(tmp_path / "r", [], settings={"name": "young", "steps": 5}))
    parsed(html)
    assert "No metrics yet" in html
    assert "How it learned" not in html
    assert "young" in html


def test_an_unfinished_run_says_how_far_it_is(tmp_path):
    html = html_of(a_run(tmp_path / "r", [training(30)], settings={"steps": 1200}))
    assert "Not finished: step 30 of 1,200 so far." in html


def test_a_loss_that_is_no_number_does_not_break_the_curves(tmp_path):
    lines = [training(1, 5.0), training(2, float("nan")), training(3, float("inf"))]
    html = html_of(a_run(tmp_path / "r", lines))
    parsed(html)
    assert not re.search(r'points="[^"]*(nan|inf)', html)


def test_the_axis_fits_what_comes_after_the_fall_at_the_beginning():
    x = np.arange(100.0)
    y = np.where(x < 5, 1000.0, 4.0 + x / 100)
    curve = Curve(x=x, y=y, label="training", kind="noisy")
    chart = line_chart(Chart("Loss", "nats", "step", [curve]))
    frame = re.search(r'data-frame="([^"]*)"', chart)
    assert frame
    low, high = (float(edge) for edge in frame[1].split()[-2:])
    assert 3.9 < low < 4.1
    assert 4.99 < high < 5.1
    assert "cut off: up to 1,000" in chart


def test_a_heat_map_is_clear_where_even_blue_where_idle_and_orange_where_busy():
    loads = np.array([[1.0, 0.25, 4.0, 0.5]] * 3)
    html = load_chart(LoadMap(title="1", note="", steps=np.arange(3.0), loads=loads, most=4.0))
    data = re.search(r"base64,([^\"]*)", html)
    assert data
    picture = matplotlib.image.imread(io.BytesIO(base64.b64decode(data[1])))
    pixels = np.round(picture * 255).astype(int)[:, 0].tolist()
    assert pixels[0][3] == 0
    assert pixels[1] == [0, 114, 178, 255]
    assert pixels[2] == [213, 94, 0, 255]
    assert pixels[3] == [0, 114, 178, 128]


def test_every_switch_layer_has_its_own_heat_map(tmp_path):
    lines = [
        {**routed(s, [0.2, 0.8]), "load/decoder.3": [0.5, 0.5], "load/decoder.11": [0.5, 0.5]}
        for s in range(1, 9)
    ]
    html = html_of(a_run(tmp_path / "r", lines))
    titles = re.findall(r"<b>((?:encoder|decoder)\.\d+)</b>", html)
    assert titles == ["encoder.1", "decoder.3", "decoder.11"]
    assert "busiest 1.60 (expert 1), idlest 0.40 (expert 0)" in html


def test_holes_are_filled_with_the_guess_and_the_original_stands_beside_a_wrong_one(tmp_path):
    inputs = "I <extra_id_0> a <extra_id_1> and <extra_id_2>."
    truth = "<extra_id_0> saw <extra_id_1> cat <extra_id_2> left"
    guess = "<extra_id_0> saw <extra_id_1> dog"
    sample = {"step": 7, "inputs": inputs, "truth": truth, "prediction": guess}
    html = html_of(a_run(tmp_path / "r", [training(7)], samples=[sample]))
    assert (
        'I <mark class="right">saw</mark> a <mark>dog</mark><ins>cat</ins> and '
        "<mark>(nothing)</mark><ins>left</ins>." in html
    )
    assert "After step 7: 1 of 3 holes as in the original" in html


def test_a_hole_that_is_left_open_is_not_right_even_if_it_hid_a_space(tmp_path):
    truth = "<extra_id_0>  <extra_id_1>  "
    sample = {"step": 7, "inputs": "a<extra_id_0>b<extra_id_1>c", "truth": truth}
    sample |= {"prediction": "<extra_id_1> "}
    html = html_of(a_run(tmp_path / "r", [training(7)], samples=[sample]))
    assert "1 of 2 holes as in the original" in html
    assert 'a<mark>(nothing)</mark><ins></ins>b<mark class="right">(space)</mark>c' in html


def test_a_continuation_follows_its_prompt_and_the_original_stands_beside_it(tmp_path):
    samples = [
        {"step": 7, "inputs": "The cat", "truth": " sat.", "prediction": " <ran>"},
        {"step": 7, "inputs": "The c", "truth": "at sat.", "prediction": "ow"},
    ]
    settings = {"model": {"decoder_only": True}}
    html = html_of(a_run(tmp_path / "r", [training(7)], samples=samples, settings=settings))
    assert "The cat <mark>&lt;ran&gt;</mark><ins>sat.</ins>" in html
    assert "The c<mark>ow</mark><ins>at sat.</ins>" in html
    assert "Validation text, continued" in html
    assert "holes" not in html


def test_the_newest_fill_ins_come_first(tmp_path):
    samples = [
        {"step": s, "inputs": "a <extra_id_0>", "truth": "", "prediction": ""} for s in range(1, 31)
    ]
    html = html_of(a_run(tmp_path / "r", [training(30)], samples=samples))
    steps = [int(step) for step in re.findall(r"After step (\d+)", html)]
    assert steps == sorted(steps, reverse=True)
    assert (steps[0], steps[-1], len(steps)) == (30, 1, 8)


def test_runs_of_mixtures_are_compared_corpus_by_corpus(tmp_path):
    def mixed(step: int, **losses: float) -> dict[str, Any]:
        parts = {f"val/loss/{name}": loss for name, loss in losses.items()}
        return validation(step, 3.0) | parts | {"epoch/de": 2.5}

    about = {"corpora": {"en": {"rate": 0.75}, "de": {"rate": 0.25}}}
    lines = [mixed(1, en=9.0, de=8.0), mixed(2, en=2.0, de=4.0)]
    both = a_run(tmp_path / "both", lines, about=about)
    one = a_run(tmp_path / "one", [mixed(2, de=3.5)])
    plain = a_run(tmp_path / "plain", [validation(1, 3.0)])
    html = write_report([both, one]).read_text(encoding="utf-8")
    parsed(html)
    said = " ".join(re.sub(r"<[^>]*>", " ", html).split())
    assert "en 75.00% of the rows 2.000 - " in said
    assert "de 4.000 25.00% of the rows, read 2.5 times 3.500 read 2.5 times" in said
    assert "The corpora" not in write_report([plain]).read_text(encoding="utf-8")


def test_every_setting_is_listed_and_differences_are_marked(tmp_path):
    one = a_run(tmp_path / "a", [training(1)], settings={"seed": 1, "model": {"d_ff": 64}})
    two = a_run(tmp_path / "b", [training(1)], settings={"seed": 2, "model": {"d_ff": 64}})
    html = html_of(one, two)
    assert '<tr class="differs"><th>seed</th><td>1</td><td>2</td></tr>' in html
    assert "<tr><th>model.d_ff</th><td>64</td><td>64</td></tr>" in html


def test_two_runs_of_one_name_are_told_apart_by_their_directories(tmp_path):
    runs = [a_run(tmp_path / f"seed{i}", [training(1)], settings={"name": "q"}) for i in (0, 1)]
    html = html_of(*runs)
    assert "<h1>seed0, seed1</h1>" in html
    assert "recipe q" in html
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        a_run(tmp_path / name / "seed0", [training(1)])
    assert "<h1>a/seed0, b/seed0</h1>" in html_of(tmp_path / "a/seed0", tmp_path / "b/seed0")


def test_the_page_is_put_into_the_run_directory_and_nothing_else_is(tmp_path):
    run = a_run(tmp_path / "r", [training(1)])
    assert write_report([run]) == run / "report.html"
    assert write_report([run, run]) == run / "comparison.html"
    assert write_report([run], tmp_path / "new" / "x.html") == tmp_path / "new" / "x.html"
    names = sorted(path.name for path in run.iterdir())
    assert names == ["comparison.html", "metrics.jsonl", "report.html"]


def test_a_long_run_stays_below_three_megabytes(tmp_path):
    shares = [1 / 64] * 64
    lines = [
        {**routed(s, shares), **{f"load/decoder.{i}": shares for i in range(5)}}
        for s in range(1, 1501)
    ]
    assert len(html_of(a_run(tmp_path / "r", lines))) < 1_000_000


def tasked(step: int, **scores: float) -> dict[str, Any]:
    """Two metrics of each task, their mean as its score, and the mean of all."""
    line: dict[str, Any] = training(step)
    for name, score in scores.items():
        own = {"score": score, "f1": score - 1, "exact_match": score + 1}
        line |= {f"task/{name}/{figure}": value for figure, value in own.items()}
    return line | {"task/mean": sum(scores.values()) / len(scores)}


def test_every_task_has_its_curves_and_the_best_step_is_marked(tmp_path):
    lines = [
        tasked(100, squad=20, rte=50),
        tasked(200, squad=40, rte=60),
        tasked(300, squad=30, rte=55),
    ]
    run = a_run(tmp_path / "run", lines)
    best = {"step": 200, "metric": "task/mean", "value": 50.0, "ended_early": True}
    (run / "best.json").write_text(json.dumps(best))
    page = write_report([run]).read_text()
    tasks = page[page.index("The tasks") :]
    assert re.findall(r'aria-label="(All tasks|squad|rte)"', tasks) == ["All tasks", "squad", "rte"]
    assert tasks.count("best: step 200") == 3
    assert "The model is that of step 200, the best by task/mean (50)." in tasks
    assert "and the run ended" in tasks
    # The table has the metrics of the best step, and says what the last one had.
    assert re.search(r"squad, f1</th><td>39\.00<br><small>step 200, the best; 29\.00 after", tasks)


def test_runs_are_compared_task_by_task(tmp_path):
    runs = [
        a_run(tmp_path / name, [tasked(100, squad=score), tasked(200, squad=score + 5)])
        for name, score in (("one", 20), ("two", 30))
    ]
    page = write_report(runs, tmp_path / "both.html").read_text()
    tasks = page[page.index("The tasks") :]
    assert re.search(r"squad, exact_match.*26\.00.*36\.00", tasks)
    assert "best: step" not in page


def test_a_run_without_tasks_says_nothing_of_them(tmp_path):
    assert "The tasks" not in write_report([a_run(tmp_path / "run", [training(1)])]).read_text()


def test_a_report_on_nothing_is_refused():
    with pytest.raises(DataError, match=r"needs at least one run directory\. Name the one"):
        write_report([])


def test_a_folder_in_place_of_samples_is_refused(tmp_path):
    (a_run(tmp_path / "run", [training(1)]) / "samples.jsonl").mkdir()
    with pytest.raises(
        DataError, match=r"samples\.jsonl is no ordinary file\.\n  Move it elsewhere"
    ):
        write_report([tmp_path / "run"])


# Runs that read different things


def of_text(path: Path, loss: float, digest: str, **more: Any) -> Path:
    about = {"text_digest": digest, "vocabulary": 512, "text": "books", **more.pop("about", {})}
    lines = [training(10, loss), validation(10, loss), validation(20, loss - 1)]
    return a_run(path, lines, about=about, **more)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"about": {"text": "news"}}, "which read the text news, not books."),
        ({"about": {"vocabulary": 1024}}, "which read a tokenizer with a vocabulary of 1024, not"),
        ({}, "which read books with other contents or another tokenizer."),
        (
            {"settings": {"data": {"tasks": ["rte=/a/rte.csv"]}}},
            "which read the tasks rte, not cola.",
        ),
        (
            {"settings": {"data": {"objective": "causal"}}},
            "which read text for the objective causal, not span_corruption.",
        ),
    ],
)
def test_runs_that_read_different_things_are_not_compared_by_loss(tmp_path, other, reason):
    settings = {"data": {"objective": "span_corruption", "tasks": ["cola=/b/cola.csv"]}}
    if "settings" in other and "tasks" not in other["settings"]["data"]:
        other["settings"]["data"]["tasks"] = settings["data"]["tasks"]
    one = of_text(tmp_path / "one", 5.0, "aa", settings=settings)
    two = of_text(tmp_path / "two", 4.0, "bb", **other)
    html = html_of(one, two)
    parsed(html)
    assert "Not compared with one by loss, and without a speed-up over it: two" in html
    assert reason in html
    assert "Speed-up" not in html
    assert "<th>Validation loss" not in html
    for name in ("one", "two"):  # each has its own curves
        (chart,) = re.findall(rf'aria-label="Loss by step: {name}".*?</svg></figure>', html)
        assert re.findall(r'data-label="(\w+), validation', chart) == [name]


def test_runs_on_the_same_text_are_compared_beside_another(tmp_path):
    runs = [
        of_text(tmp_path / name, 5.0, digest) for name, digest in zip("abc", "112", strict=True)
    ]
    html = html_of(*runs)
    assert "Speed-up in steps, b" in html
    assert "Speed-up in steps, c" not in html
    assert "Loss by step: a and 1 more" in html
    assert "Loss by step: c" in html


def test_older_runs_that_do_not_say_what_they_read_are_compared(tmp_path):
    runs = [a_run(tmp_path / name, [validation(1, 5.0)]) for name in "ab"]
    assert "Speed-up in steps" in html_of(*runs)


# Fills and what they are worth


def test_fills_are_judged_by_the_probability_of_the_original_beside_two_baselines(tmp_path):
    sample = {
        "step": 7,
        "inputs": "I <extra_id_0> the <extra_id_1> of <extra_id_2>.",
        "truth": "<extra_id_0> saw <extra_id_1> the <extra_id_2> of it",
        "prediction": "<extra_id_0> saw <extra_id_1> a",
        "holes": [
            {"hole": 0, "nats": math.log(4), "tokens": 1, "unigram": "the", "copy": "I"},
            {"hole": 1, "nats": math.log(2), "tokens": 1, "unigram": "the", "copy": "the"},
            {"hole": 2, "nats": 20.0, "tokens": 2, "unigram": "the", "copy": "of"},
        ],
    }
    html = html_of(a_run(tmp_path / "r", [training(7)], samples=[sample])).replace("\xa0", " ")
    # exp(-(ln 4 + ln 2 + 20) / 4)
    assert (
        "After step 7: 0.4 % per token of the original; 1 of 3 holes as in the original "
        "(most frequent token 1, token before 1)" in html
    )
    assert '<mark class="right">saw</mark> <small>25 %</small>' in html
    assert "<ins>the</ins> <small>50 %</small>" in html
    assert "<ins>of it</ins> <small>under 0.001 %</small>" in html


def test_the_commands_of_the_page_about_the_report_are_understood():
    page = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    commands = re.findall(r"\$ switchworks report (.*?) *(?:#.*)?\n", page)
    assert len(commands) == 3
    flags = [parse_flags(ReportFlags, "report", words.split()) for words in commands]
    assert flags[2].figures == Path("paper")
