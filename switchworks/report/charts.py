"""Pictures as inline SVG: curves over time, and the load of every expert over time.

Colours are CSS variables of the page (`--c0` ... `--c5`, `--ink`, `--grid`), so that light, dark
and paper each get their own. A picture is 480 units wide: about as wide as a phone shows it.
"""

import base64
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, TypeVar

import matplotlib.image
import numpy as np
from jaxtyping import Float
from matplotlib.ticker import MaxNLocator

from switchworks.report.runs import last_part

Numbers = TypeVar("Numbers", float, np.ndarray)

COLOURS = 6
"""Colours of the palette, `--c0` to `--c5`; a seventh curve begins again."""
POINTS = 600
"""Most points drawn of one curve: more cannot be told apart at this width."""
COLUMNS = 120
"""Most columns of a heat map; each is the mean of the lines that fall into it."""
BELOW, ABOVE = (0, 114, 178), (213, 94, 0)
"""Loads under and over the even share. Told apart by every common kind of colour vision."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One curve of a chart, in the units of its axes."""

    x: Float[np.ndarray, " N"]
    y: Float[np.ndarray, " N"]
    label: str
    colour: int = 0
    kind: Literal["noisy", "smooth", "plain", "points"] = "noisy"
    """noisy: faint as it is, and smoothed on top. smooth: only smoothed. plain: as it is.
    points: as it is, with dots."""

    @property
    def shown(self) -> Float[np.ndarray, " N"]:
        """The values the curve itself goes through."""
        return smooth(self.y) if self.kind in ("noisy", "smooth") else self.y


@dataclass(frozen=True)
class Frame:
    """The rectangle of a chart, in picture units, and the values at its edges."""

    left: int
    top: int
    right: int
    bottom: int
    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, x: Numbers) -> Numbers:
        """Values of x as picture units."""
        return self.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (self.right - self.left)

    def down(self, y: Numbers) -> Numbers:
        """Values of y as picture units, which grow downwards."""
        return self.bottom - (y - self.y[0]) / (self.y[1] - self.y[0]) * (self.bottom - self.top)


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

    The y axis fits what comes after the first tenth of the run: the fall at the beginning
    would flatten all the rest. What lies outside is cut off, and said. `reference` is a value
    worth a dashed line, and its name; `mark` is a place along x worth one.
    """
    several = len(curves) > 1  # then a single one with points must be named, too
    curves = [curve for curve in curves if len(curve.x)]
    if not curves:
        return ""
    frame = Frame(50, 16, 424, 226, _span_of(curves), _fitted(curves, from_zero, reference))
    inner = "".join(_curve(frame, curve) for curve in curves)
    parts = [
        _axes(frame, x_label),
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
    return _figure(
        title,
        unit,
        _legend(curves) if several else "",
        f'<svg class="chart" viewBox="0 0 480 268" role="img" aria-label="{escape(title)}" '
        f'data-frame="{edges}" data-x="{escape(x_label)}">{"".join(parts)}</svg>',
    )


def load_chart(
    layer: str,
    steps: Float[np.ndarray, " N"],
    loads: Float[np.ndarray, "N E"],
    *,
    note: str,
    most: float,
) -> str:
    """A `<figure>` of one switch layer: a heat map over time, and bars of how it ended.

    `loads` are shares of the tokens times E, so 1 is even. `most` is the right end of the bars'
    axis, the same for all layers of a run.
    """
    experts = loads.shape[1]
    span = (float(steps[0]), float(steps[-1]) if steps[-1] > steps[0] else float(steps[0]) + 1)
    heat = Frame(34, 24, 322, 190, span, (experts - 0.5, -0.5))
    bars = Frame(346, 24, 462, 190, (0.0, most), (experts - 0.5, -0.5))
    ended = last_part(loads).mean(axis=0)
    picture = (
        f'<svg viewBox="0 0 480 226" role="img" aria-label="Expert load, {escape(layer)}">'
        f'<text class="small" x="{heat.left}" y="14">over training</text>'
        f'<text class="small" x="{bars.left}" y="14">at the end</text>'
        f'<image x="{heat.left}" y="{heat.top}" width="{heat.right - heat.left}" '
        f'height="{heat.bottom - heat.top}" preserveAspectRatio="none" '
        f'href="{_heat_map(steps, loads)}"/>'
        f'<rect class="frame" x="{heat.left}" y="{heat.top}" width="{heat.right - heat.left}" '
        f'height="{heat.bottom - heat.top}"/>'
        f"{_expert_names(heat, experts)}{_bottom(heat, 'step', bins=4)}"
        f"{_bars(bars, ended)}{_bottom(bars, 'times the even share', bins=3)}"
        "</svg>"
    )
    return _figure(layer, note, "", picture)


def colour_bar() -> str:
    """The key of all heat maps: a quarter of the even share and less, to four times and more."""
    below, above = (f"rgb{colour}" for colour in (BELOW, ABOVE))
    names = ("&frac14; or less", "&frac12;", "1 = even", "2", "4 or more")
    return (
        '<div class="colourbar"><div style="background:linear-gradient(90deg,'
        f'{below},transparent 50%,{above})"></div>'
        + "".join(f"<span>{name}</span>" for name in names)
        + "</div>"
    )


def _figure(title: str, unit: str, legend: str, picture: str) -> str:
    return (
        f"<figure><figcaption><b>{escape(title)}</b> <span>{escape(unit)}</span></figcaption>"
        f"{legend}{picture}</figure>"
    )


def _span_of(curves: Sequence[Curve]) -> tuple[float, float]:
    first = min(float(curve.x[0]) for curve in curves)
    last = max(float(curve.x[-1]) for curve in curves)
    if first < 0.1 * last:
        first = 0.0
    return (first, last) if last > first else (first, first + 1)


def _fitted(
    curves: Sequence[Curve], from_zero: bool, reference: tuple[float, str] | None
) -> tuple[float, float]:
    first, last = _span_of(curves)
    ends: list[float] = [] if reference is None else [reference[0]]
    for curve in curves:
        settled = curve.x >= first + 0.1 * (last - first)
        y = curve.y[settled] if settled.any() else curve.y
        if (
            curve.kind in ("noisy", "smooth") and len(y) > 40
        ):  # a few spikes must not flatten the rest
            ends += np.percentile(y, [1, 99]).tolist()
        else:
            ends += [float(y.min()), float(y.max())]
    low, high = min(ends), max(ends)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return (0.0 if from_zero and low >= 0 else low - room), high + room


def _axes(frame: Frame, x_label: str) -> str:
    marks = []
    for value in _ticks(*frame.y, bins=5):
        y = frame.down(value)
        marks.append(f'<path class="grid" d="M{frame.left} {y:.1f}H{frame.right}"/>')
        marks.append(
            f'<text x="{frame.left - 7}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>'
        )
    return "".join(marks) + _bottom(frame, x_label, bins=6)


def _bottom(frame: Frame, label: str, *, bins: int) -> str:
    marks = [f'<path class="axis" d="M{frame.left} {frame.bottom}H{frame.right}"/>']
    for value in _ticks(*frame.x, bins=bins):
        x = frame.across(value)
        marks.append(f'<path class="axis" d="M{x:.1f} {frame.bottom}v4"/>')
        marks.append(
            f'<text x="{x:.1f}" y="{frame.bottom + 17}" text-anchor="middle">'
            f"{_number(value)}</text>"
        )
    middle = (frame.left + frame.right) / 2
    return (
        "".join(marks) + f'<text class="label" x="{middle}" y="{frame.bottom + 34}" '
        f'text-anchor="middle">{escape(label)}</text>'
    )


def _ticks(low: int | float, high: int | float, *, bins: int) -> np.ndarray:
    ticks: np.ndarray = np.asarray(
        MaxNLocator(nbins=bins, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    )
    slack = 1e-9 * (high - low)
    return ticks[(ticks >= low - slack) & (ticks <= high + slack)]


def _number(value: float) -> str:
    return f"{round(float(value), 12):,.10g}"


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

    Where several runs are validated, only that is named: twice the numbers would hide it.
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
    limit = frame.bottom - 6  # clear of the numbers along the axis
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
    late = x > (frame.left + frame.right) / 2  # then its name stands before it
    heights = [frame.down(float(np.interp(place, one.x, one.shown))) for one in curves]
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


def _heat_map(steps: np.ndarray, loads: np.ndarray) -> str:
    """A PNG as a data address, one row per expert; even shares are transparent."""
    columns = min(COLUMNS, len(steps))
    edges = np.linspace(steps[0], steps[-1], columns + 1)
    column = np.searchsorted(edges[1:-1], steps, side="right")
    nearest = [np.abs(steps - middle).argmin() for middle in (edges[1:] + edges[:-1]) / 2]
    table = np.stack(
        [
            loads[column == c].mean(axis=0) if (column == c).any() else loads[nearest[c]]
            for c in range(columns)
        ],
        axis=1,
    )
    strength = np.clip(np.log2(np.maximum(table, 1e-9)) / 2, -1, 1)
    picture = np.empty((*table.shape, 4), dtype=np.uint8)
    picture[..., :3] = np.where(strength[..., None] > 0, ABOVE, BELOW)
    picture[..., 3] = np.round(np.abs(np.nan_to_num(strength)) * 255)
    file = io.BytesIO()
    matplotlib.image.imsave(file, picture, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _expert_names(frame: Frame, experts: int) -> str:
    return "".join(
        f'<text x="{frame.left - 6}" y="{frame.down(expert) + 4:.1f}" '
        f'text-anchor="end">{expert:.0f}</text>'
        for expert in _ticks(0, experts - 1, bins=5)
        if expert == int(expert)
    )


def _bars(frame: Frame, loads: Float[np.ndarray, " E"]) -> str:
    tall = (frame.bottom - frame.top) / len(loads)
    even = frame.across(1.0)
    bars = "".join(
        f'<rect class="{"over" if load > 1 else "under"}" x="{frame.left}" '
        f'y="{frame.top + (expert + 0.1) * tall:.2f}" height="{0.8 * tall:.2f}" '
        f'width="{frame.across(load) - frame.left:.1f}">'
        f"<title>expert {expert}: {load:.2f} times the even share</title></rect>"
        for expert, load in enumerate(np.nan_to_num(loads))
    )
    return f'{bars}<path class="reference" d="M{even:.1f} {frame.top}V{frame.bottom}"/>'
