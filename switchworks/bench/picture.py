"""The rows as a picture: bars of ratios, or step time against the number of experts."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from switchworks.bench.measure import Row

BLUE, GREY = "#0072b2", "#8a8f96"


def draw_bars(rows: list[Row], file: Path) -> None:
    """Write `file`: a bar with its spread per row that has a ratio.

    Rows in which more is better are above, the others below.
    """
    halves = [
        [row for row in rows if row.ratio is not None and row.less_is_better == less]
        for less in (False, True)
    ]
    heights = [max(1, len(half)) for half in halves]
    figure = Figure(figsize=(9, 1.6 + 0.3 * sum(heights)), layout="constrained")
    axes = figure.subplots(2, 1, height_ratios=heights)
    titles = ("ours over the peer's: more is better", "ours over the peer's: less is better")
    for ax, half, title in zip(axes, halves, titles, strict=True):
        ax.set_title(title, loc="left", fontsize=10)
        _bars(ax, half)
    _save(figure, file)


def draw_sweep(rows: list[Row], file: Path) -> None:
    """Write `file`: measured step time against E, with its quartiles, and the line of traffic."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.subplots()
    experts = [(row.details or {})["side"]["experts"] for row in rows]
    lines = [row.peer or 0.0 for row in rows]
    ax.plot(experts, lines, "--", color=GREY, label="memory traffic")
    for number, row, line in zip(experts, rows, lines, strict=True):
        low, high = row.spread or (0.0, 0.0)
        ax.plot([number, number], [low * line, high * line], color=BLUE, alpha=0.5)
    ax.plot(experts, [row.ours or 0.0 for row in rows], "o-", color=BLUE, label="measured")
    ax.set_xscale("log", base=2)
    ax.set_xticks(experts, [str(number) for number in experts])
    ax.set_ylim(bottom=0)
    ax.set_xlabel("experts, at the same number of tokens")
    ax.set_ylabel("ms per training step")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    _save(figure, file)


def _bars(ax: Axes, rows: list[Row]) -> None:
    for place, row in enumerate(reversed(rows)):
        ratio = row.ratio or 0.0
        ax.barh(place, ratio, color=BLUE)
        if row.spread is not None:
            ax.plot(row.spread, [place, place], color="black", linewidth=1)
        ax.annotate(f" {ratio:.2f}", (ratio, place), va="center", fontsize=8)
    ax.set_yticks(range(len(rows)), [row.name for row in reversed(rows)], fontsize=8)
    ax.axvline(1, color=GREY, linewidth=1)
    ax.margins(x=0.08)


def _save(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
