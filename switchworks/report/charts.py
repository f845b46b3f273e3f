"""Curves over time, as inline SVG."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np
from jaxtyping import Float

from switchworks.report.frame import Frame, axes
from switchworks.report.html import figure
from switchworks.report.runs import Run

COLOURS = 6
"""Colours of the palette, `--c0` to `--c5`; a seventh curve begins again."""
POINTS = 600
"""Most points drawn of one curve: more are not visible at this width."""


Kind = Literal["noisy", "smooth", "plain", "points"]
"""noisy: the raw values faint, and smoothed on top. smooth: only smoothed. plain: the raw values.
points: the raw values, with dots."""


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
    series = [run.series(key) for run in runs]
    return [
        Curve(x=x, y=y * scale, label=run.name, colour=colour, kind=kind)
        for colour, (run, (x, y)) in enumerate(zip(runs, series, strict=True))
    ]


def smooth(y: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """A moving mean over a twenty-fifth of the curve.

    The window shrinks towards the beginning, where losses fall steeply, so that it adds no bias.
    A curve of fewer than 50 points stays as it is.
    """
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
    reference: tuple[float, str] | None = None,
    mark: tuple[float, str] | None = None,
) -> str:
    """A `<figure>` with `curves`; "" if none of them has a point.

    The y axis fits the values after the first tenth of the run: the fall at the beginning would
    flatten all the rest. What lies outside is cut off, with a note. `reference` is a value of y and
    a name for the dashed line there; `mark` is the same for x.
    """
    several = len(curves) > 1  # the legend names the curves left, even if that is one
    curves = [curve for curve in curves if len(curve.x)]
    if not curves:
        return ""
    frame = Frame(50, 16, 424, 226, _span(curves), _y_range(curves, from_zero, reference))
    inner = "".join(_curve(frame, curve) for curve in curves)
    parts = [
        axes(frame, x_label),
        _reference(frame, reference) if reference else "",
        _mark(frame, mark, curves) if mark else "",
        f'<svg x="{frame.left}" y="{frame.top}" width="{frame.right - frame.left}" '
        f'height="{frame.bottom - frame.top}" '
        f'viewBox="{frame.left} {frame.top} {frame.right - frame.left} {frame.bottom - frame.top}">'
        f"{inner}</svg>",
        "".join(_dots(frame, curve) for curve in curves if curve.kind == "points"),
        _end_labels(frame, curves),
        _cut_off(frame, curves),
    ]
    edges = " ".join(
        f"{v:.6g}" for v in (frame.left, frame.right, frame.top, frame.bottom, *frame.x, *frame.y)
    )
    picture = (
        f'<svg class="chart" viewBox="0 0 480 268" role="img" aria-label="{escape(title)}" '
        f'data-frame="{edges}" data-x="{escape(x_label)}">{"".join(parts)}</svg>'
    )
    return figure(title, unit, picture, _legend(curves) if several else "")


def _span(curves: Sequence[Curve]) -> tuple[float, float]:
    first = min(float(curve.x[0]) for curve in curves)
    last = max(float(curve.x[-1]) for curve in curves)
    if first < 0.1 * last:
        first = 0.0
    return (first, last) if last > first else (first, first + 1)


def _y_range(
    curves: Sequence[Curve], from_zero: bool, reference: tuple[float, str] | None
) -> tuple[float, float]:
    first, last = _span(curves)
    ends: list[float] = [] if reference is None else [reference[0]]
    for curve in curves:
        settled = curve.x >= first + 0.1 * (last - first)
        y = curve.y[settled] if settled.any() else curve.y
        # Of a long noisy curve the outer percents are left out: spikes must not flatten the rest.
        if curve.kind in ("noisy", "smooth") and len(y) > 40:
            ends += np.percentile(y, [1, 99]).tolist()
        else:
            ends += [float(y.min()), float(y.max())]
    low, high = min(ends), max(ends)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return (0.0 if from_zero and low >= 0 else low - room), high + room


def _value(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _curve(frame: Frame, curve: Curve) -> str:
    colour = f"--c{curve.colour % COLOURS}"
    drawn = (
        f'<polyline class="curve {curve.kind}" style="stroke:var({colour})" '
        f'data-label="{escape(curve.label)}" points="{_points(frame, curve.x, curve.shown)}"/>'
    )
    if curve.kind != "noisy":
        return drawn
    raw = _points(frame, curve.x, curve.y)
    return f'<polyline class="raw" style="stroke:var({colour})" points="{raw}"/>{drawn}'


def _points(frame: Frame, x: np.ndarray, y: np.ndarray) -> str:
    x, y = _thinned(x, y)
    pairs = zip(frame.across(x).tolist(), frame.down(y).tolist(), strict=True)
    return " ".join(f"{across:.1f},{down:.1f}" for across, down in pairs)


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points: the lowest and the highest of each stretch, so that spikes stay."""
    if len(x) <= POINTS:
        return x, y
    keep = {0, len(x) - 1}
    for stretch in np.array_split(np.arange(len(x)), POINTS // 2 - 1):
        keep |= {int(stretch[y[stretch].argmin()]), int(stretch[y[stretch].argmax()])}
    kept = sorted(keep)
    return x[kept], y[kept]


def _dots(frame: Frame, curve: Curve) -> str:
    inside = (curve.y >= frame.y[0]) & (curve.y <= frame.y[1])
    if inside.sum() > 40:
        return ""
    return "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" style="fill:var(--c{curve.colour % COLOURS})"/>'
        for x, y in zip(
            frame.across(curve.x[inside]).tolist(),
            frame.down(curve.y[inside]).tolist(),
            strict=True,
        )
    )


def _end_labels(frame: Frame, curves: Sequence[Curve]) -> str:
    """The last value of every curve beside its end, moved apart where they would overlap.

    Beside curves with points, which are validation losses, smooth ones have no label.
    """
    dotted = any(curve.kind == "points" for curve in curves)
    ends = []
    for curve in curves:
        if dotted and curve.kind == "smooth":
            continue
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
        f'style="fill:var(--c{colour})"/>'
        f'<text class="end" x="{frame.right + 12}" y="{place + 4:.1f}">{_value(value)}</text>'
        for place, value, colour in ends
    )


def _cut_off(frame: Frame, curves: Sequence[Curve]) -> str:
    peak = max(float(curve.y.max()) for curve in curves)
    if peak <= frame.y[1]:
        return ""
    return (
        f'<text class="small" x="{frame.right}" y="{frame.top - 5}" text-anchor="end">'
        f"cut off above: up to {_value(peak)}</text>"
    )


def _reference(frame: Frame, reference: tuple[float, str]) -> str:
    value, name = reference
    y = frame.down(value)
    return (
        f'<path class="reference" d="M{frame.left} {y:.1f}H{frame.right}"/>'
        f'<text class="small" x="{frame.left + 4}" y="{y - 5:.1f}">{escape(name)}</text>'
    )


def _mark(frame: Frame, mark: tuple[float, str], curves: Sequence[Curve]) -> str:
    """A dashed line across, named where the curves leave room: at the bottom or at the top."""
    place, name = mark
    if not frame.x[0] <= place <= frame.x[1]:
        return ""
    x, middle = frame.across(place), (frame.top + frame.bottom) / 2
    late = x > (frame.left + frame.right) / 2  # then its name stands left of it
    heights = [frame.down(float(np.interp(place, c.x, c.shown))) for c in curves]
    y = frame.bottom - 6 if np.mean(heights) < middle else frame.top + 12
    return (
        f'<path class="reference" d="M{x:.1f} {frame.top}V{frame.bottom}"/>'
        f'<text class="small" x="{x + (-4 if late else 4):.1f}" y="{y}" '
        f'text-anchor="{"end" if late else "start"}">{escape(name)}</text>'
    )


def _legend(curves: Sequence[Curve]) -> str:
    return (
        '<div class="legend">'
        + "".join(
            f'<span><i class="{curve.kind}" style="color:var(--c{curve.colour % COLOURS})"></i>'
            f"{escape(curve.label)}</span>"
            for curve in curves
        )
        + "</div>"
    )
