"""Pictures about many languages, as PNG: legible with a hundred rows or columns.

Names are codes and English names, so that no font needs other scripts.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure

from switchworks.disk import whole_file

DENSE, SWITCH = "#d55e00", "#0072b2"
_LOADS = LinearSegmentedColormap.from_list("loads", [SWITCH, "#ffffff", DENSE])
_ROW, _MARGIN, _DPI = 0.16, 2.2, 110  # inches of a row, inches around, dots per inch


def draw_quality(
    path: Path, names: Sequence[str], dense: Sequence[float], switch: Sequence[float]
) -> None:
    """The paper's figure 7: both models' quality on every language, ordered by the dense twin's."""
    order: list[int] = np.argsort(dense).tolist()
    places = np.arange(len(order))
    low, high = np.asarray(dense)[order], np.asarray(switch)[order]
    figure = Figure((max(7.0, _ROW * len(order) + 1.6), 5.2), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.vlines(places, np.minimum(low, high), np.maximum(low, high), color="#c8c8c4", zorder=1)
    axes.scatter(places, low, s=18, color=DENSE, label="dense twin", zorder=2)
    axes.scatter(places, high, s=18, color=SWITCH, label="switch model", zorder=3)
    axes.set_xticks(places, [names[index] for index in order], rotation=90, fontsize=8)
    axes.set_xlim(-1, len(order))
    axes.set_ylabel("negative log perplexity\n(higher is better)")
    axes.set_title("Quality by language", loc="left")
    axes.grid(axis="y", color="#ececea")
    axes.legend(frameon=False, loc="lower right")
    _bare(axes)
    with whole_file(path) as aside:
        figure.savefig(aside)


def draw_speedups(path: Path, speedups: Sequence[float]) -> None:
    """The paper's figure 8: how many languages have which step speed-up over the dense twin. Those
    that did not reach its quality have a bar apart."""
    reached = np.array([value for value in speedups if math.isfinite(value)])
    missing = len(speedups) - len(reached)
    figure = Figure((8.0, 4.6), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    note = ""
    if len(reached):
        top = max(2.0, float(np.quantile(reached, 0.99)) * 1.1)
        if above := int((reached > top).sum()):
            note = f"\n(the last bar has {above} above {top:.1f}x)"
        axes.hist(np.minimum(reached, top), bins=np.linspace(0, top, 31).tolist(), color=SWITCH)
        axes.axvline(reached.mean(), color="#1c1d1f", linestyle="--", linewidth=1)
        axes.annotate(
            f"mean {reached.mean():.2f}x", (reached.mean(), 0.97), (4, 0), va="top",
            xycoords=("data", "axes fraction"), textcoords="offset points",
        )  # fmt: skip
    axes.axvline(1, color="#8a8d91", linewidth=1)
    if missing:
        axes.bar(-0.25, missing, width=0.2, color=DENSE)
        axes.annotate(f"{missing} not\nreached", (-0.25, missing), ha="center", va="bottom")
    axes.margins(y=0.15)
    axes.set_xlabel(f"step speed-up: steps of the dense twin over steps to its final quality{note}")
    axes.set_ylabel("languages")
    axes.set_title(f"Step speed-up over {len(speedups)} languages", loc="left")
    _bare(axes)
    with whole_file(path) as aside:
        figure.savefig(aside)


def draw_heat(
    path: Path, rows: Sequence[str], layers: Sequence[str], shares: Float[np.ndarray, "K N E"]
) -> None:
    """Each expert's share of each row's tokens, times E: white is even, blue less, orange more."""
    experts = shares.shape[-1]
    loads = np.log2(np.maximum(shares.reshape(len(rows), -1) * experts, 2**-3))
    size = (max(6.0, 0.13 * loads.shape[1] + 4.2), _ROW * len(rows) + _MARGIN)
    figure, axes, bar = _matrix(size, rows, loads, (-3.0, 3.0), _LOADS)
    for edge in range(1, len(layers)):
        axes.axvline(edge * experts - 0.5, color="#1c1d1f", linewidth=1.2)
    middles = [(index + 0.5) * experts - 0.5 for index in range(len(layers))]
    axes.set_xticks(middles, layers, fontsize=9)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel(f"switch layers, {experts} experts each")
    bar.set_ticks([-3, -2, -1, 0, 1, 2, 3], labels=["1/8", "1/4", "1/2", "even", "2x", "4x", "8x"])
    bar.set_label("share of the tokens that go to an expert, over an even share")
    with whole_file(path) as aside:
        figure.savefig(aside)


def draw_similarity(path: Path, rows: Sequence[str], similar: Float[np.ndarray, "K K"]) -> None:
    """How alike languages are routed, in the order of the tree that puts the likest together."""
    side = _ROW * len(rows)
    least, most = np.quantile(similar[~np.eye(len(rows), dtype=bool)], [0.02, 0.995])
    size = (side + 4.4, side + _MARGIN)
    figure, axes, bar = _matrix(size, rows, similar, (least, most), "viridis")
    axes.set_xticks([])
    bar.set_label("similarity of routing: 1 minus the Jensen-Shannon distance, mean over layers")
    with whole_file(path) as aside:
        figure.savefig(aside)


def _matrix(
    size: tuple[float, float],
    rows: Sequence[str],
    values: Float[np.ndarray, "K columns"],
    ends: tuple[float, float],
    colours: str | Colormap,
) -> tuple[Figure, Axes, Colorbar]:
    """A figure of `size` in inches: `values` as colours, with the names of the rows and the key."""
    figure = Figure(size, dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    low, high = ends
    image = axes.imshow(
        values, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest"
    )
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=40, pad=0.01)
    return figure, axes, bar


def _bare(axes: Axes) -> None:
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
