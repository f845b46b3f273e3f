"""Curves over time, as inline SVG."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Literal

import numpy as np
from jaxtyping import Float

from switchworks.report.html import figure
from switchworks.report.runs import Run
from switchworks.report.svg import COLOURS, Frame, axes, colour, svg, text, upright

POINTS = 600

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


def line_chart(
    title: str,
    unit: str,
    x_label: str,
    curves: Sequence[Curve],
    *,
    from_zero: bool = False,
    reference: Mark | None = None,
    mark: Mark | None = None,
) -> str:
    """A `<figure>` with `curves`; "" if none has a point. `reference` is a line across, `mark`
    down. The y axis fits the values after the first tenth of the run; what lies outside is cut off,
    and a note says so."""
    several = len(curves) > 1  # the legend names the curves left, even if that is one
    curves = [curve for curve in curves if len(curve.x)]
    if not curves:
        return ""
    frame = Frame(50, 16, 424, 226, _span(curves), _y_range(curves, from_zero, reference))
    left, right, top, bottom = frame.left, frame.right, frame.top, frame.bottom
    edges = " ".join(f"{edge:.6g}" for edge in (left, right, top, bottom, *frame.x, *frame.y))
    lines = "".join(_line(frame, curve) for curve in curves)
    picture = svg(
        title,
        268,
        axes(frame, x_label),
        _reference(frame, reference) if reference else "",
        _mark(frame, mark, curves) if mark else "",
        f'<svg {frame.box} viewBox="{left} {top} {right - left} {bottom - top}">{lines}</svg>',
        *(_dots(frame, curve) for curve in curves if curve.kind == "points"),
        _end_labels(frame, curves),
        _cut_off(frame, curves),
        attributes=f'class="chart" data-frame="{edges}" data-x="{escape(x_label)}"',
    )
    return figure(title, unit, picture, _legend(curves) if several else "")


def _span(curves: Sequence[Curve]) -> tuple[float, float]:
    first = min(float(curve.x[0]) for curve in curves)
    last = max(float(curve.x[-1]) for curve in curves)
    if first < 0.1 * last:
        first = 0.0
    return (first, last) if last > first else (first, first + 1)


def _y_range(
    curves: Sequence[Curve], from_zero: bool, reference: Mark | None
) -> tuple[float, float]:
    first, last = _span(curves)
    ends: list[float] = [] if reference is None else [reference[0]]
    for curve in curves:
        settled = curve.x >= first + 0.1 * (last - first)
        y = curve.y[settled] if settled.any() else curve.y
        # Of a long noisy curve the outer percents are left out: spikes must not flatten the rest.
        outer = 1 if curve.kind in ("noisy", "smooth") and len(y) > 40 else 0
        ends += np.percentile(y, [outer, 100 - outer]).tolist()
    low, high = min(ends), max(ends)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return (0.0 if from_zero and low >= 0 else low - room), high + room


def short(value: float) -> str:
    """A number with four digits, or all those before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


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
    if inside.sum() > 40:
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
        below[0] = max(below[0], above[0] + 15)
    limit = frame.bottom - 6  # above the numbers of the x axis
    for end in reversed(ends):
        end[0] = min(end[0], limit)
        limit = end[0] - 15
    return "".join(
        f'<rect x="{frame.right + 5}" y="{place - 4:.1f}" width="4" height="8" rx="2" '
        f'style="fill:{colour(number)}"/>'
        + text(frame.right + 12, place + 4, short(value), kind="end")
        for place, value, number in ends
    )


def _cut_off(frame: Frame, curves: Sequence[Curve]) -> str:
    peak = max(float(curve.y.max()) for curve in curves)
    note = f"cut off above: up to {short(peak)}"
    return text(frame.right, frame.top - 5, note, "end") if peak > frame.y[1] else ""


def _reference(frame: Frame, reference: Mark) -> str:
    y = frame.down(reference[0])
    line = f'<path class="reference" d="M{frame.left} {y:.1f}H{frame.right}"/>'
    return line + text(frame.left + 4, y - 5, reference[1])


def _mark(frame: Frame, mark: Mark, curves: Sequence[Curve]) -> str:
    """A dashed line down, named where the curves leave room: at the bottom or at the top."""
    place, name = mark
    if not frame.x[0] <= place <= frame.x[1]:
        return ""
    x, middle = frame.across(place), (frame.top + frame.bottom) / 2
    heights = [frame.down(float(np.interp(place, c.x, c.shown))) for c in curves]
    y = frame.bottom - 6 if np.mean(heights) < middle else frame.top + 12
    late = x > (frame.left + frame.right) / 2  # then its name stands left of it
    return upright(frame, x) + text(x + (-4 if late else 4), y, name, "end" if late else "start")


def _legend(curves: Sequence[Curve]) -> str:
    entries = "".join(
        f'<span><i class="{curve.kind}" style="color:{colour(curve.colour)}"></i>'
        f"{escape(curve.label)}</span>"
        for curve in curves
    )
    return f'<div class="legend">{entries}</div>'
