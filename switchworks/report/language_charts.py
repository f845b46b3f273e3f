"""Pictures about many languages, as PNG: legible with a hundred rows or columns.

Names are codes and English names, so that no font needs other scripts.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from scipy.cluster.hierarchy import dendrogram

from switchworks.data import script_name

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
    figure.savefig(path)


def draw_speedups(path: Path, speedups: Sequence[float]) -> None:
    """The paper's figure 8: how many languages have which step speed-up over the dense twin.

    Languages in which the switch model did not reach the dense twin's quality have a bar apart.
    """
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
    figure.savefig(path)


def draw_heat(
    path: Path,
    rows: Sequence[str],
    scripts: Sequence[str],
    layers: Sequence[str],
    shares: Float[np.ndarray, "K N E"],
) -> None:
    """Each expert's share of each row's tokens, times E: white is even, blue less, orange more."""
    experts = shares.shape[-1]
    loads = np.log2(np.maximum(shares.reshape(len(rows), -1) * experts, 2**-3))
    size = (max(6.0, 0.13 * loads.shape[1] + 4.2), _ROW * len(rows) + _MARGIN)
    figure = Figure(size, dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(loads, cmap=_LOADS, vmin=-3, vmax=3, aspect="auto", interpolation="nearest")
    for edge in range(1, len(layers)):
        axes.axvline(edge * experts - 0.5, color="#1c1d1f", linewidth=1.2)
    middles = [(index + 0.5) * experts - 0.5 for index in range(len(layers))]
    axes.set_xticks(middles, layers, fontsize=9)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel(f"switch layers, {experts} experts each")
    _script_labels(axes, rows, scripts)
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=40, pad=0.01)
    bar.set_ticks([-3, -2, -1, 0, 1, 2, 3], labels=["1/8", "1/4", "1/2", "even", "2x", "4x", "8x"])
    bar.set_label("share of the tokens that go to an expert, over an even share")
    figure.savefig(path)


def draw_similarity(
    path: Path,
    rows: Sequence[str],
    scripts: Sequence[str],
    similar: Float[np.ndarray, "K K"],
    tree: Float[np.ndarray, "merges four"],
) -> None:
    """How alike languages are routed, beside the tree that puts the likest together."""
    side = _ROW * len(rows)
    figure = Figure((side + 6.0, side + _MARGIN), dpi=_DPI, layout="constrained")
    branches, axes = figure.subplots(1, 2, width_ratios=[1.6, max(4.0, side)])
    figure.get_layout_engine().set(wspace=0, w_pad=0.02)  # type: ignore[union-attr]
    dendrogram(
        tree, orientation="left", no_labels=True, ax=branches, color_threshold=0,
        above_threshold_color="#5c6066",
    )  # fmt: skip
    branches.invert_yaxis()
    branches.set_axis_off()
    apart = similar[~np.eye(len(rows), dtype=bool)]
    least, most = np.quantile(apart, [0.02, 0.995])
    image = axes.imshow(
        similar, cmap="viridis", vmin=least, vmax=most, aspect="auto", interpolation="nearest"
    )
    axes.set_xticks([])
    axes.yaxis.tick_right()
    _script_labels(axes, rows, scripts)
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=40, pad=0.01)
    bar.set_label("similarity of routing: 1 minus the Jensen-Shannon distance, mean over layers")
    figure.savefig(path)


def _script_labels(axes: Axes, rows: Sequence[str], scripts: Sequence[str]) -> None:
    """Names of the rows in the colours of their scripts, with a legend of the scripts."""
    by_size = sorted(set(scripts), key=lambda script: (-scripts.count(script), script))
    palette = [*colormaps["tab10"].colors, *colormaps["Dark2"].colors, *colormaps["Set1"].colors]  # type: ignore[attr-defined]
    colours = {
        script: tuple(0.72 * part for part in palette[index % len(palette)])
        for index, script in enumerate(by_size)
    }
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    for label, script in zip(axes.get_yticklabels(), scripts, strict=True):
        label.set_color(colours[script])
    if len(by_size) > 1 and len(rows) > len(by_size):
        patches = [Patch(color=colours[script], label=script_name(script)) for script in by_size]
        axes.legend(
            handles=patches, ncols=6, fontsize=8, frameon=False, loc="upper center",
            bbox_to_anchor=(0.5, -0.003),
        )  # fmt: skip


def _bare(axes: Axes) -> None:
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
