"""The load of every expert of a switch layer: a heat map over time, and how it ended."""

import base64
import io
from html import escape

import numpy as np
from jaxtyping import Float

from switchworks.report.frame import Frame, bottom, ticks
from switchworks.report.html import figure
from switchworks.report.runs import last_part

COLUMNS = 120
"""Most columns of a heat map."""
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
        f"{_expert_names(heat, experts)}{bottom(heat, 'step', bins=4)}"
        f"{_bars(bars, ended)}{bottom(bars, 'times the even share', bins=3)}"
        "</svg>"
    )
    return figure(layer, note, picture)


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


def _heat_map(steps: np.ndarray, loads: np.ndarray) -> str:
    """A PNG as a data address, one row per expert; even shares are transparent.

    A column is the mean of the steps that fall into it; where none does, the nearest step's.
    """
    import matplotlib.image

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
    # Opacity is |log2 load| / 2: full at a quarter of the even share and at four times it.
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
        for expert in ticks(0, experts - 1, bins=5)
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
