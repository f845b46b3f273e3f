"""The load of every expert of a switch layer: a heat map over time, and how it ended."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from switchworks.report.html import figure
from switchworks.report.runs import last_part
from switchworks.report.svg import Frame, bottom, svg, text, ticks, upright

COLUMNS = 120
BELOW, ABOVE = (0, 114, 178), (213, 94, 0)
"""RGB of loads under and over the even share, distinct for all common colour vision."""


@dataclass(frozen=True, kw_only=True)
class LoadMap:
    """The load of one switch layer. `loads` are shares of the tokens times E, so 1 is even."""

    title: str
    note: str
    steps: Float[np.ndarray, " N"]
    loads: Float[np.ndarray, "N E"]
    most: float
    """Where the axis of the bars ends."""

    @property
    def span(self) -> tuple[float, float]:
        """The first step and the last."""
        first, last = float(self.steps[0]), float(self.steps[-1])
        return first, last if last > first else first + 1

    @property
    def columns(self) -> Float[np.ndarray, "E columns"]:
        """The means of so many stretches of the run as the map has columns."""
        parts = np.array_split(self.loads, min(COLUMNS, len(self.loads)))
        return np.stack([part.mean(axis=0) for part in parts], axis=1)

    @property
    def end(self) -> Float[np.ndarray, " E"]:
        """The mean of the last tenth, which the bars show."""
        return last_part(self.loads).mean(axis=0)


def load_chart(load: LoadMap) -> str:
    """A `<figure>` of one switch layer: a heat map over time, and bars of how it ended."""
    experts = load.loads.shape[1]
    heat = Frame(34, 24, 306, 190, load.span, (experts - 0.5, -0.5))
    bars = Frame(346, 24, 462, 190, (0.0, load.most), (experts - 0.5, -0.5))
    picture = svg(
        f"Expert load, {load.title}",
        232,
        text(heat.left, 14, "over training"),
        text(bars.left, 14, "at the end"),
        heat_map(heat, load.columns),
        *(
            text(heat.left - 6, heat.down(expert) + 4, f"{expert:.0f}", "end", "")
            for expert in ticks(0, experts - 1, bins=5)
            if expert == int(expert)
        ),
        bottom(heat, "step", bins=4),
        _bars(bars, load.end),
        bottom(bars, "times even", bins=3),
    )
    return figure(load.title, load.note, picture)


def colour_bar() -> str:
    """The key of all heat maps: a quarter of the even share and less, to four times and more."""
    names = ("&frac14; or less", "&frac12;", "1 = even", "2", "4 or more")
    return (
        '<div class="colourbar"><div style="background:linear-gradient(90deg,'
        f'rgb{BELOW},transparent 50%,rgb{ABOVE})"></div>'
        + "".join(f"<span>{name}</span>" for name in names)
        + "</div>"
    )


def strength(loads: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """log2 of the load over 2, within -1 and 1: the ends are a quarter of the even share and four
    times it. The colour tells the sign, its opacity the rest."""
    return np.clip(np.log2(np.maximum(loads, 1e-9)) / 2, -1, 1)


def heat_map(frame: Frame, loads: Float[np.ndarray, "rows columns"]) -> str:
    """A PNG of multiples of the even share that fills the frame; even shares are transparent."""
    import matplotlib.image

    colours = strength(loads)
    picture = np.empty((*colours.shape, 4), dtype=np.uint8)
    picture[..., :3] = np.where(colours[..., None] > 0, ABOVE, BELOW)
    picture[..., 3] = np.round(np.abs(colours) * 255)
    file = io.BytesIO()
    matplotlib.image.imsave(file, picture, format="png")
    data = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    image = f'<image {frame.box} preserveAspectRatio="none" href="{data}"/>'
    return f'{image}<rect class="frame" {frame.box}/>'


def _bars(frame: Frame, loads: Float[np.ndarray, " E"]) -> str:
    """Bars in the colours of the map, over grey so that even ones are seen."""
    tall = (frame.bottom - frame.top) / len(loads)
    bars = ""
    for expert, (load, opacity) in enumerate(zip(loads, abs(strength(loads)), strict=True)):
        box = (
            f'x="{frame.left}" y="{frame.top + (expert + 0.1) * tall:.2f}" '
            f'width="{frame.across(load) - frame.left:.1f}" height="{0.8 * tall:.2f}"'
        )
        bars += (
            f'<rect class="even" {box}/><rect class="{"over" if load > 1 else "under"}" {box} '
            f'fill-opacity="{opacity:.3f}">'
            f"<title>expert {expert}: {load:.2f} times the even share</title></rect>"
        )
    return bars + upright(frame, frame.across(1.0))
