"""The load of every expert of a switch layer: a heat map over time, and how it ended."""

import base64
import io

import numpy as np
from jaxtyping import Float

from switchworks.report.html import figure
from switchworks.report.runs import last_part
from switchworks.report.svg import Frame, bottom, svg, text, ticks, upright

COLUMNS = 120
BELOW, ABOVE = (0, 114, 178), (213, 94, 0)
"""RGB of loads under and over the even share, distinct for all common colour vision."""


def load_chart(
    layer: str,
    steps: Float[np.ndarray, " N"],
    loads: Float[np.ndarray, "N E"],
    *,
    note: str,
    most: float,
) -> str:
    """A `<figure>` of one switch layer: a heat map over time, and bars of how it ended, up to
    `most`. `loads` are shares of the tokens times E, so 1 is even."""
    experts = loads.shape[1]
    span = (float(steps[0]), float(steps[-1]) if steps[-1] > steps[0] else float(steps[0]) + 1)
    heat = Frame(34, 24, 322, 190, span, (experts - 0.5, -0.5))
    bars = Frame(346, 24, 462, 190, (0.0, most), (experts - 0.5, -0.5))
    columns = [part.mean(axis=0) for part in np.array_split(loads, min(COLUMNS, len(loads)))]
    picture = svg(
        f"Expert load, {layer}",
        226,
        text(heat.left, 14, "over training"),
        text(bars.left, 14, "at the end"),
        heat_map(heat, np.stack(columns, axis=1)),
        *(
            text(heat.left - 6, heat.down(expert) + 4, f"{expert:.0f}", "end", "")
            for expert in ticks(0, experts - 1, bins=5)
            if expert == int(expert)
        ),
        bottom(heat, "step", bins=4),
        _bars(bars, last_part(loads).mean(axis=0)),
        bottom(bars, "times the even share", bins=3),
    )
    return figure(layer, note, picture)


def colour_bar() -> str:
    """The key of all heat maps: a quarter of the even share and less, to four times and more."""
    names = ("&frac14; or less", "&frac12;", "1 = even", "2", "4 or more")
    return (
        '<div class="colourbar"><div style="background:linear-gradient(90deg,'
        f'rgb{BELOW},transparent 50%,rgb{ABOVE})"></div>'
        + "".join(f"<span>{name}</span>" for name in names)
        + "</div>"
    )


def heat_map(frame: Frame, loads: Float[np.ndarray, "rows columns"]) -> str:
    """A PNG of multiples of the even share that fills the frame; even shares are transparent."""
    import matplotlib.image

    # Opacity is |log2 load| / 2: full at a quarter of the even share and at four times it.
    strength = np.clip(np.log2(np.maximum(loads, 1e-9)) / 2, -1, 1)
    picture = np.empty((*strength.shape, 4), dtype=np.uint8)
    picture[..., :3] = np.where(strength[..., None] > 0, ABOVE, BELOW)
    picture[..., 3] = np.round(np.abs(strength) * 255)
    file = io.BytesIO()
    matplotlib.image.imsave(file, picture, format="png")
    data = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    image = f'<image {frame.box} preserveAspectRatio="none" href="{data}"/>'
    return f'{image}<rect class="frame" {frame.box}/>'


def _bars(frame: Frame, loads: Float[np.ndarray, " E"]) -> str:
    tall = (frame.bottom - frame.top) / len(loads)
    bars = "".join(
        f'<rect class="{"over" if load > 1 else "under"}" x="{frame.left}" '
        f'y="{frame.top + (expert + 0.1) * tall:.2f}" height="{0.8 * tall:.2f}" '
        f'width="{frame.across(load) - frame.left:.1f}">'
        f"<title>expert {expert}: {load:.2f} times the even share</title></rect>"
        for expert, load in enumerate(loads)
    )
    return bars + upright(frame, frame.across(1.0))
