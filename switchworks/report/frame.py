"""The rectangle that a chart is drawn in, its axes and their numbers, as SVG.

Colours are CSS variables of the page (`--c0` ... `--c5`, `--ink`, `--grid`), so that light, dark
and paper each get their own. A picture is 480 units wide: about as wide as a phone shows it.
"""

from dataclasses import dataclass
from html import escape
from typing import TypeVar

import numpy as np

Numbers = TypeVar("Numbers", float, np.ndarray)


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


def axes(frame: Frame, x_label: str) -> str:
    """Both axes with their numbers, and a line across at each number of y."""
    marks = []
    for value in ticks(*frame.y, bins=5):
        y = frame.down(value)
        marks.append(f'<path class="grid" d="M{frame.left} {y:.1f}H{frame.right}"/>')
        marks.append(
            f'<text x="{frame.left - 7}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>'
        )
    return "".join(marks) + bottom(frame, x_label, bins=6)


def bottom(frame: Frame, label: str, *, bins: int) -> str:
    """The x axis, with about `bins` numbers and its name below."""
    marks = [f'<path class="axis" d="M{frame.left} {frame.bottom}H{frame.right}"/>']
    for value in ticks(*frame.x, bins=bins):
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


def ticks(low: int | float, high: int | float, *, bins: int) -> np.ndarray:
    """About `bins` round numbers within [low, high]."""
    from matplotlib.ticker import MaxNLocator  # a run that writes no report does without

    ticks: np.ndarray = np.asarray(
        MaxNLocator(nbins=bins, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    )
    slack = 1e-9 * (high - low)
    return ticks[(ticks >= low - slack) & (ticks <= high + slack)]


def _number(value: float) -> str:
    return f"{round(float(value), 12):,.10g}"
