"""Curves over time, as inline SVG."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Literal

import numpy as np
from jaxtyping import Float

from switchworks.report.html import figure
from switchworks.report.runs import Run
from switchworks.report.svg import (
    COLOURS,
    WIDTH,
    Frame,
    axes,
    colour,
    left_of_numbers,
    number,
    svg,
    text,
    text_width,
    upright,
)

POINTS = 600
FEW = 40
"""Curves of so many points have dots, and are never cut."""
LINE = 18
"""The height of a line of text, on a phone."""

Kind = Literal["noisy", "smooth", "plain", "points"]
"""noisy: the raw values faint, and smoothed on top. smooth: only smoothed. plain: the raw values.
points: the raw values, with dots."""
Mark = tuple[float, str]
"""A value on an axis, and a name for the dashed line there."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One curve of a chart, in the units of its axes."""

    x: Float[np.ndarray, " N"]
    y: Float[np.ndarray, " N"]
    label: str
    colour: int = 0
    kind: Kind = "noisy"

    @property
    def shown(self) -> Float[np.ndarray, " N"]:
        """The y values of the line that is drawn."""
        return smooth(self.y) if self.kind in ("noisy", "smooth") else self.y


def curves_of(
    runs: Sequence[Run], key: str, *, kind: Kind | None = None, scale: int = 1
) -> list[Curve]:
    """`key` against steps, a curve per run; by default noisy, and of several runs smooth."""
    kind = kind or ("noisy" if len(runs) == 1 else "smooth")
    curves = []
    for place, run in enumerate(runs):
        x, y = run.series(key)
        curves.append(Curve(x=x, y=y * scale, label=run.name, colour=place, kind=kind))
    return curves


def points_of(run: Run, keys: Mapping[str, str]) -> list[Curve]:
    """Label -> key of one run as curves with points."""
    return [
        replace(curves_of([run], key, kind="points")[0], label=label, colour=place)
        for place, (label, key) in enumerate(keys.items())
    ]


def smooth(y: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """A moving mean over a twenty-fifth of the curve; the window shrinks towards the beginning,
    where losses fall steeply, so that it adds no bias."""
    reach = np.minimum(np.arange(len(y)), len(y) // 50)
    first = np.arange(len(y)) - reach
    after = np.minimum(np.arange(len(y)) + reach + 1, len(y))
    sums = np.concatenate([[0.0], np.cumsum(y)])
    return (sums[after] - sums[first]) / (after - first)


@dataclass(frozen=True)
class Chart:
    """Curves over one axis. `reference` is a line across, `mark` one down."""

    title: str
    unit: str
    x_label: str
    curves: Sequence[Curve]
    from_zero: bool = field(default=False, kw_only=True)
    reference: Mark | None = field(default=None, kw_only=True)
    mark: Mark | None = field(default=None, kw_only=True)

    @property
    def drawn(self) -> list[Curve]:
        """The curves that have a point."""
        return [curve for curve in self.curves if len(curve.x)]

    @property
    def x_range(self) -> tuple[float, float]:
        """From the first point, or from 0 if that is near, to the last."""
        first = min(float(curve.x[0]) for curve in self.drawn)
        last = max(float(curve.x[-1]) for curve in self.drawn)
        if first < 0.1 * last:
            first = 0.0
        return (first, last) if last > first else (first, first + 1)

    @property
    def y_range(self) -> tuple[float, float]:
        """All values, and some room. Only long noisy curves may be cut: to their values after the
        first tenth without the outer percents, where these had less than a quarter of the height
        else, because of a steep beginning or of spikes."""
        first, last = self.x_range
        whole: list[float] = [] if self.reference is None else [self.reference[0]]
        settled = list(whole)
        for curve in self.drawn:
            whole += [float(curve.y.min()), float(curve.y.max())]
            if curve.kind in ("noisy", "smooth") and len(curve.y) > FEW:
                after = curve.y[curve.x >= first + 0.1 * (last - first)]
                settled += np.percentile(after if len(after) else curve.y, [1, 99]).tolist()
            else:
                settled += whole[-2:]
        low, high = min(whole), max(whole)
        if max(settled) - min(settled) < (high - low) / 4:
            low, high = min(settled), max(settled)
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        return (0.0 if self.from_zero and low >= 0 else low - room), high + room

    @property
    def cut_off(self) -> str:
        """How far the curves reach outside the y range, as a note; "" if they do not."""
        low = min(float(curve.y.min()) for curve in self.drawn)
        high = max(float(curve.y.max()) for curve in self.drawn)
        ends = [f"up to {short(high)}"] if high > self.y_range[1] else []
        ends += [f"down to {short(low)}"] if low < self.y_range[0] else []
        return f"cut off: {' and '.join(ends)}" if ends else ""


def line_chart(chart: Chart) -> str:
    """A `<figure>` of `chart`; "" if no curve has a point. A note says what is cut off."""
    curves = chart.drawn
    if not curves:
        return ""
    frame = _frame(chart)
    left, right, top, bottom = frame.left, frame.right, frame.top, frame.bottom
    edges = " ".join(f"{edge:.6g}" for edge in (left, right, top, bottom, *frame.x, *frame.y))
    lines = "".join(_line(frame, curve) for curve in curves)
    picture = svg(
        chart.title,
        272,
        axes(frame, chart.x_label),
        _reference(frame, chart.reference) if chart.reference else "",
        _mark(frame, chart.mark, curves, chart.reference) if chart.mark else "",
        f'<svg {frame.box} viewBox="{left} {top} {right - left} {bottom - top}">{lines}</svg>',
        *(_dots(frame, curve) for curve in curves if len(curve.x) == 1 or curve.kind == "points"),
        _end_labels(frame, curves),
        text(frame.right, frame.top - 7, chart.cut_off, "end") if chart.cut_off else "",
        attributes=f'class="chart" data-frame="{edges}" data-x="{escape(chart.x_label)}"',
    )
    # The legend names the curves left, even if that is one.
    return figure(
        chart.title, chart.unit, picture, _legend(curves) if len(chart.curves) > 1 else ""
    )


def _frame(chart: Chart) -> Frame:
    """The chart's frame: left and right of it is room for numbers."""
    ends = max(text_width(short(float(curve.shown[-1])), "end") for curve in chart.drawn)
    last = text_width(number(chart.x_range[1])) / 2  # the last number of the x axis
    left, right = left_of_numbers(chart.y_range), WIDTH - round(max(14 + ends, last))
    return Frame(left, 20, right, 226, chart.x_range, chart.y_range)


def short(value: float) -> str:
    """A number with four digits, or all those before the point of up to seven."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def _line(frame: Frame, curve: Curve) -> str:
    stroke = f'style="stroke:{colour(curve.colour)}"'
    drawn = (
        f'<polyline class="curve {curve.kind}" {stroke} data-label="{escape(curve.label)}" '
        f'points="{_points(frame, curve.x, curve.shown)}"/>'
    )
    if curve.kind != "noisy":
        return drawn
    raw = _points(frame, curve.x, curve.y)
    return f'<polyline class="raw" {stroke} points="{raw}"/>{drawn}'


def _points(frame: Frame, x: np.ndarray, y: np.ndarray) -> str:
    """At most POINTS points: the lowest and the highest of each stretch, so that spikes stay."""
    if len(x) > POINTS:
        stretches = np.array_split(np.arange(len(x)), POINTS // 2 - 1)
        ends = [(part[y[part].argmin()], part[y[part].argmax()]) for part in stretches]
        kept = np.unique([0, len(x) - 1, *itertools.chain(*ends)])
        x, y = x[kept], y[kept]
    return " ".join(f"{across:.1f},{down:.1f}" for across, down in frame.places(x, y))


def _dots(frame: Frame, curve: Curve) -> str:
    inside = (curve.y >= frame.y[0]) & (curve.y <= frame.y[1])
    if inside.sum() > FEW:
        return ""
    return "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" style="fill:{colour(curve.colour)}"/>'
        for x, y in frame.places(curve.x[inside], curve.y[inside])
    )


def _end_labels(frame: Frame, curves: Sequence[Curve]) -> str:
    """The last value of every curve beside its end, moved apart where they would overlap; not of
    smooth ones beside validation losses."""
    dotted = any(curve.kind == "points" for curve in curves)
    ends = []
    for curve in curves:
        if not (dotted and curve.kind == "smooth"):
            value = float(curve.shown[-1])
            place = float(np.clip(frame.down(value), frame.top, frame.bottom))
            ends.append([place, value, curve.colour % COLOURS])
    ends.sort()
    for above, below in itertools.pairwise(ends):
        below[0] = max(below[0], above[0] + LINE)
    limit = frame.bottom - 6  # above the numbers of the x axis
    for end in reversed(ends):
        end[0] = min(end[0], limit)
        limit = end[0] - LINE
    return "".join(
        f'<rect x="{frame.right + 5}" y="{place - 4:.1f}" width="4" height="8" rx="2" '
        f'style="fill:{colour(tint)}"/>'
        + text(frame.right + 12, place + 4, short(value), kind="end")
        for place, value, tint in ends
    )


def _reference(frame: Frame, reference: Mark) -> str:
    y = frame.down(reference[0])
    line = f'<path class="reference" d="M{frame.left} {y:.1f}H{frame.right}"/>'
    return line + text(frame.left + 4, _above(frame, reference), reference[1])


def _above(frame: Frame, reference: Mark) -> float:
    """The base of the name of a line across: over it, or below it where it is at the top."""
    y = frame.down(reference[0])
    return y - 5 if y - LINE > frame.top else y + LINE - 2


def _mark(frame: Frame, mark: Mark, curves: Sequence[Curve], reference: Mark | None) -> str:
    """A dashed line down, named where the curves leave room: at the bottom or at the top."""
    place, name = mark
    if not frame.x[0] <= place <= frame.x[1]:
        return ""
    x, middle = frame.across(place), (frame.top + frame.bottom) / 2
    heights = [frame.down(float(np.interp(place, c.x, c.shown))) for c in curves]
    places = [frame.bottom - 6.0, frame.bottom - 6.0 - LINE, frame.top + 12.0]
    if np.mean(heights) >= middle:
        places = [frame.top + 12.0, frame.top + 12.0 + LINE, frame.bottom - 6.0]
    taken = -LINE if reference is None else _above(frame, reference)
    y = next(place for place in places if abs(place - taken) >= LINE)
    late = x > (frame.left + frame.right) / 2  # then its name stands left of it
    return upright(frame, x) + text(x + (-4 if late else 4), y, name, "end" if late else "start")


def _legend(curves: Sequence[Curve]) -> str:
    entries = "".join(
        f'<span><i class="{curve.kind}" style="color:{colour(curve.colour)}"></i>'
        f"{escape(curve.label)}</span>"
        for curve in curves
    )
    return f'<div class="legend">{entries}</div>'
