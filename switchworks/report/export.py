"""The curves and maps of a page as figures for a paper: SVG and PDF, and CSV of what is drawn."""

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from switchworks.disk import whole_file
from switchworks.report.charts import FEW, Chart, Curve
from switchworks.report.load_chart import LoadMap, strength
from switchworks.report.page import page_charts, with_distinct_names
from switchworks.report.runs import read_run

COLOURS = ("#0072b2", "#d55e00", "#00855f", "#b0578d", "#a87400", "#4b5563")
"""As on the page on white, page.css."""
_LOADS = LinearSegmentedColormap.from_list("loads", [COLOURS[0], "#ffffff", COLOURS[1]])
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "switchworks",  # the same figure is the same file
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_DOTTED: dict[str, Any] = {"color": "#5c6066", "linestyle": ":", "linewidth": 1}
_BESIDE: dict[str, Any] = {"xytext": (3, 3), "textcoords": "offset points", "fontsize": 8}

Rows = list[tuple[str | float, ...]]


def write_figures(run_dirs: Sequence[Path], folder: Path) -> list[str]:
    """Write every chart of the page about these runs into `folder` as NAME.svg, NAME.pdf and
    NAME.csv; returns the names. Titles say the runs. Raises DataError for a directory that holds no
    run."""
    runs = with_distinct_names([read_run(Path(path)) for path in run_dirs])
    names: list[str] = []
    for run, chart in page_charts(runs):
        if isinstance(chart, Chart) and not chart.drawn:
            continue
        label = chart.title if run is None else f"{run.name} {chart.title}"
        name = _unused(re.sub(r"[^\w.]+", "-", label).strip("-").lower(), names)
        names.append(name)
        single = runs[0] if len(runs) == 1 else run  # else the legend names them
        draw = _draw_curves if isinstance(chart, Chart) else _draw_map
        with _figure(folder / name) as figure:
            rows = draw(figure, chart)  # type: ignore[arg-type]
            figure.suptitle((f"{single.name}: " if single else "") + chart.title, fontsize=9)
        _write_csv(folder / f"{name}.csv", rows)
    return names


def _unused(name: str, taken: Sequence[str]) -> str:
    return name if name not in taken else f"{name}-{len(taken)}"


@contextmanager
def _figure(path: Path) -> Iterator[Figure]:
    """A figure that is saved as `path`.svg and .pdf at the end, without a date."""
    with mpl.rc_context(_STYLE):
        figure = Figure((5.0, 3.4), layout="constrained")
        yield figure
        dates: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
        for kind, date in dates.items():
            with whole_file(path.with_name(f"{path.name}.{kind}")) as aside:
                figure.savefig(aside, format=kind, metadata=date)
            figure.set_layout_engine("none")  # it is laid out by now, which takes most of the time


def _draw_curves(figure: Figure, chart: Chart) -> Rows:
    axes = figure.subplots()
    rows: Rows = [("curve", chart.x_label, "value", "drawn")]
    dotted = any(curve.kind == "points" for curve in chart.drawn)
    for curve in chart.drawn:
        colour = COLOURS[curve.colour % len(COLOURS)]
        if curve.kind == "noisy":
            axes.plot(curve.x, curve.y, color=colour, linewidth=0.6, alpha=0.3)
        is_marked = len(curve.x) == 1 or (curve.kind == "points" and len(curve.x) <= FEW)
        axes.plot(
            *(curve.x, curve.shown, "--" if dotted and curve.kind == "smooth" else "-"),
            **{"color": colour, "label": fill(curve.label, 60), "linewidth": 1.2},
            **{"marker": "o" if is_marked else "", "markersize": 3},
        )
        rows += _points(curve)
    axes.set_title(chart.cut_off, loc="right", fontsize=8)
    axes.set(xlabel=chart.x_label, ylabel=chart.unit, xlim=chart.x_range, ylim=chart.y_range)
    if chart.reference is not None:
        axes.axhline(chart.reference[0], **_DOTTED)
        axes.annotate(chart.reference[1], (chart.x_range[0], chart.reference[0]), **_BESIDE)
    if chart.mark is not None:
        axes.axvline(chart.mark[0], **_DOTTED)
        axes.annotate(chart.mark[1], (chart.mark[0], chart.y_range[0]), rotation=90, **_BESIDE)
    if len(chart.drawn) > 1:
        figure.set_figheight(3.2 + 0.17 * len(chart.drawn))
        figure.legend(loc="outside lower left", frameon=False)
    return rows


def _points(curve: Curve) -> Rows:
    columns = (curve.x.tolist(), curve.y.tolist(), curve.shown.tolist())
    return [(curve.label, *point) for point in zip(*columns, strict=True)]


def _draw_map(figure: Figure, load: LoadMap) -> Rows:
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    columns, end, experts = load.columns, load.end, load.loads.shape[1]
    extent = (*load.span, experts - 0.5, -0.5)
    image = heat.imshow(
        strength(columns), cmap=_LOADS, vmin=-1, vmax=1, aspect="auto", extent=extent,
        interpolation="nearest",
    )  # fmt: skip
    heat.set(xlabel="step", ylabel="expert")
    heat.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    bars.barh(range(experts), end, color=_LOADS((strength(end) + 1) / 2), edgecolor="#5c6066",
              linewidth=0.4)  # fmt: skip
    bars.axvline(1, **_DOTTED)
    bars.set(xlabel="at the end", xlim=(0, load.most))
    key = figure.colorbar(image, ax=[heat, bars], location="bottom", shrink=0.6, aspect=40)
    key.set_ticks([-1, -0.5, 0, 0.5, 1], labels=["1/4", "1/2", "even", "2", "4"])
    steps = [part.mean() for part in np.array_split(load.steps, columns.shape[1])]
    rows: Rows = [("part", "step", "expert", "times the even share")]
    for step, column in zip(steps, columns.T, strict=True):
        rows += [("over training", step, place, value) for place, value in enumerate(column)]
    return rows + [("at the end", load.span[1], place, value) for place, value in enumerate(end)]


def _write_csv(path: Path, rows: Rows) -> None:
    with whole_file(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
