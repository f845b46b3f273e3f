"""Charts: nothing is hidden, no label touches another, and colours tell loads apart."""

import itertools
import re
from functools import cache
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from switchworks.report.charts import Chart, Curve, line_chart
from switchworks.report.load_chart import LoadMap, load_chart
from switchworks.report.svg import text_width

SIZES = {"": (15.0, "normal"), "label": (15.0, "normal"), "small": (13.5, "normal")}
SIZES["end"] = (15.0, "bold")
"""As page.css has them on a phone, where letters are largest."""


@cache
def width(words: str, kind: str) -> float:
    """In DejaVu Sans, which is wide."""
    size, weight = SIZES[kind]
    extents = TextPath(
        (0, 0), words, prop=FontProperties(family="DejaVu Sans", weight=weight), size=size
    )
    return float(extents.get_extents().x1)


def text_boxes(figure: str) -> dict[str, tuple[float, float, float, float]]:
    """Words and place -> left, top, right, bottom of every text of a figure's picture."""
    picture = ElementTree.fromstring(re.findall(r"<svg.*</svg>", figure, flags=re.DOTALL)[0])
    boxes = {}
    for text in picture.iter("text"):
        words, kind = text.text or "", text.get("class", "")
        x, y, size = float(text.get("x", 0)), float(text.get("y", 0)), SIZES[kind][0]
        wide = width(words, kind)
        left = x - {"start": 0.0, "middle": wide / 2, "end": wide}[text.get("text-anchor", "")]
        boxes[f"{words} at {x}, {y}"] = (left, y - 0.76 * size, left + wide, y)
    return boxes


def collisions(figure: str) -> list[str]:
    """Texts that touch each other or leave the picture."""
    boxes, (height,) = text_boxes(figure), re.findall(r'viewBox="0 0 480 (\d+)"', figure)
    assert len(boxes) > 5
    wrong = [
        name
        for name, (left, top, right, bottom) in boxes.items()
        if left < 0 or top < 0 or right > 480 or bottom > int(height) - 3
    ]
    for (one, a), (two, b) in itertools.combinations(boxes.items(), 2):
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]:
            wrong.append(f"{one} / {two}")
    return wrong


def y_range(figure: str) -> tuple[float, float]:
    (edges,) = re.findall(r'data-frame="([^"]*)"', figure)
    low, high = map(float, edges.split()[-2:])
    return low, high


@pytest.mark.parametrize("words", ["0.0001", "12,345", "of Mannheim", "WWW", "1e+07", "all 128"])
@pytest.mark.parametrize("kind", SIZES)
def test_a_text_is_given_the_room_it_takes(words, kind):
    assert width(words, kind) <= text_width(words, kind) <= 1.7 * width(words, kind) + 4


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6, 3e9])
def test_no_label_of_a_chart_touches_another_or_leaves_the_picture(count, scale):
    x = np.linspace(0, 1_234_567, 60)
    curves = [
        Curve(x=x, y=scale * (3 + np.cos(x / 3e5) + n / 50), label="a-long-name" * 9, colour=n)
        for n in range(count)
    ]
    for reference, mark in itertools.product((3.0, 4.1, 2.0), (x[3], x[30], x[-3])):
        chart = Chart(
            "Loss", "nats", "training time, seconds", curves,
            reference=(scale * reference, "even"), mark=(mark, "best: step 1,234,567"),
        )  # fmt: skip
        assert collisions(line_chart(chart)) == []


def test_a_note_on_what_is_cut_off_touches_nothing():
    y = 3 + np.sin(np.arange(400.0)) / 10
    y[[5, 200]] = 123456.7, -123456.7
    curve = Curve(x=np.arange(400.0), y=y, label="norm")
    figure = line_chart(Chart("Norm", "", "step", [curve], reference=(3.11, "all 128")))
    assert "cut off: up to 123,457 and down to -123,457" in figure
    assert collisions(figure) == []


@pytest.mark.parametrize("experts", [2, 8, 128])
@pytest.mark.parametrize("last", [100.0, 1_234_567.0])
def test_no_label_of_a_load_map_touches_another_or_leaves_the_picture(experts, last):
    steps, loads = np.linspace(0, last, 40), np.ones((40, experts))
    for most in (2.0, 8.4, 128.0):
        figure = load_chart(LoadMap(title="e", note="", steps=steps, loads=loads, most=most))
        assert collisions(figure) == []


@pytest.mark.parametrize("kind", ["noisy", "smooth", "plain", "points"])
def test_a_curve_of_two_points_is_seen_whole(kind):
    curve = Curve(x=np.array([20.0, 400.0]), y=np.array([9.0, 4.0]), label="val", kind=kind)
    low, high = y_range(line_chart(Chart("Loss", "nats", "step", [curve])))
    assert low < 4 < 9 < high


def test_the_peak_of_the_learning_rate_is_seen():
    x = np.arange(1000.0)
    rate = np.where(x < 20, x / 20, np.maximum(0.01, 20 / np.maximum(x, 1)))
    curve = Curve(x=x, y=rate, label="lr", kind="plain")
    figure = line_chart(Chart("Learning rate", "", "step", [curve], from_zero=True))
    assert y_range(figure)[1] > 1
    assert "cut off" not in figure


def test_a_loss_that_falls_as_losses_do_is_not_cut():
    x = np.arange(1.0, 500)
    curve = Curve(x=x, y=3.5 + 7 * np.exp(-x / 80), label="training")
    low, high = y_range(line_chart(Chart("Loss", "nats", "step", [curve])))
    assert low < 3.6
    assert high > 10


def test_one_point_is_a_dot():
    curve = Curve(x=np.array([20.0]), y=np.array([9.0]), label="training")
    assert line_chart(Chart("Loss", "nats", "step", [curve])).count("<circle") == 1


def test_bars_tell_a_little_over_even_from_four_times():
    loads = np.array([[1.01, 4.0, 0.99, 0.25]])
    figure = load_chart(LoadMap(title="e", note="", steps=np.ones(1), loads=loads, most=4.2))
    bars = re.findall(r'<rect class="(over|under)"[^>]*fill-opacity="([\d.]+)"', figure)
    assert [kind for kind, _ in bars] == ["over", "over", "under", "under"]
    slight, most, *_ = (float(opacity) for _, opacity in bars)
    assert slight < 0.01
    assert most == 1.0
    assert figure.count('class="even"') == 4  # so that even bars are seen
