"""The rectangle that a chart is drawn in, its axes, and the elements of a picture, as SVG.

Colours are CSS variables of the page, so that light, dark and paper each get their own. A picture
is 480 units wide: about as wide as a phone shows it.
"""

from dataclasses import dataclass
from html import escape
from typing import TypeVar

import numpy as np

WIDTH = 480
COLOURS = 6
"""Colours of the palette, `--c0` to `--c5`; a seventh curve begins again."""

SIZES = {"small": 13.5}
"""Of letters by the kind of text, as page.css has them on a phone, where they are largest."""
SIZE = 15.0
"""Of all other kinds."""

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

    def places(self, x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
        """Points in picture units."""
        return list(zip(self.across(x).tolist(), self.down(y).tolist(), strict=True))

    @property
    def box(self) -> str:
        """The attributes of an element that fills the frame."""
        wide, tall = self.right - self.left, self.bottom - self.top
        return f'x="{self.left}" y="{self.top}" width="{wide}" height="{tall}"'


def svg(title: str, height: float, *parts: str, attributes: str = "") -> str:
    """A picture of `parts`, with its title for those who cannot see it."""
    return (
        f'<svg {attributes} viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "small") -> str:
    """Words, escaped here, of which `anchor` (start, middle, end) stands at x."""
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{escape(words)}</text>"
    )


def text_width(words: str, kind: str = "") -> float:
    """How wide `words` are at most, in picture units: in DejaVu Sans Bold, the widest of the usual
    fonts, and as large as on a phone."""
    narrow, wide = sum(map(words.count, ".,:;|!'iljI ")), sum(map(words.count, "mwMW%@"))
    return SIZES.get(kind, SIZE) * (0.72 * len(words) - 0.3 * narrow + 0.38 * wide)


def upright(frame: Frame, x: float) -> str:
    """A dashed line down the frame, at a place in picture units."""
    return f'<path class="reference" d="M{x:.1f} {frame.top}V{frame.bottom}"/>'


def colour(number: int) -> str:
    """A colour of the palette as CSS."""
    return f"var(--c{number % COLOURS})"


def axes(frame: Frame, x_label: str) -> str:
    """Both axes with their numbers, and a line across at each number of y."""
    marks = []
    for value in ticks(*frame.y, bins=5):
        y = frame.down(value)
        marks.append(f'<path class="grid" d="M{frame.left} {y:.1f}H{frame.right}"/>')
        marks.append(text(frame.left - 7, y + 4, number(value), "end", ""))
    return "".join(marks) + bottom(frame, x_label, bins=6)


def left_of_numbers(y: tuple[float, float]) -> int:
    """The left edge of a frame, which leaves room for the numbers of its y axis."""
    return 12 + round(max(text_width(number(value)) for value in ticks(*y, bins=5)))


def bottom(frame: Frame, label: str, *, bins: int) -> str:
    """The x axis, with at most about `bins` numbers that do not touch, and its name below."""
    room, values = frame.right - frame.left, ticks(*frame.x, bins=bins)
    widest = max(text_width(number(value)) for value in values) + 8
    while bins > 1 and widest * (len(values) - 1) > room:
        bins -= 1
        values = ticks(*frame.x, bins=bins)
    marks = [f'<path class="axis" d="M{frame.left} {frame.bottom}H{frame.right}"/>']
    for value in values:
        x = frame.across(value)
        marks.append(f'<path class="axis" d="M{x:.1f} {frame.bottom}v4"/>')
        marks.append(text(x, frame.bottom + 18, number(value), "middle", ""))
    middle = (frame.left + frame.right) / 2
    return "".join(marks) + text(middle, frame.bottom + 36, label, "middle", "label")


def ticks(low: int | float, high: int | float, *, bins: int) -> np.ndarray:
    """About `bins` round numbers within [low, high]."""
    from matplotlib.ticker import MaxNLocator  # a run that writes no report does without

    ticks = np.asarray(MaxNLocator(nbins=bins, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
    slack = 1e-9 * (high - low)
    return ticks[(ticks >= low - slack) & (ticks <= high + slack)]


def number(value: float) -> str:
    """A number of an axis: 0.0002, 1,500, and from ten millions on 2e+07."""
    return f"{value:.4g}" if abs(value) >= 1e7 else f"{round(float(value), 12):,.10g}"
