"""The results of all studies as one page of Markdown with pictures, and as one HTML file."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from switchworks.disk import whole_file, write_text
from switchworks.lab.analysis import Comparison, compare
from switchworks.lab.results import losses
from switchworks.lab.statistics import Interval
from switchworks.report import html

HEAD = ("", "loss (nats)", "ahead by", "fewer steps", "in seconds", "verdict")
COLOURS = ("#4a5a70", "#c4442d", "#d98b2b", "#2f7f6f", "#7a5ba6", "#3d78b8", "#a03a6b")


def write_pages(results: Sequence[Mapping[str, Any]], markdown: Path, page: Path) -> None:
    """Write `markdown`, a picture of each study beside it, and `page`, which holds its pictures."""
    compared = [(study, comparisons) for study in results if (comparisons := compare(study))]
    head, *rows = summary(compared)
    text = [INTRODUCTION, _markdown_table(head, rows)]
    sections = [html.header("Results", ["switchworks lab"])]
    sections.append(html.table(head, [[escape(cell) for cell in row] for row in rows]))
    for study, comparisons in compared:
        picture = draw(study, comparisons)
        name = f"results-{study['study']}.png"
        with whole_file(markdown.parent / name) as aside:
            aside.write_bytes(picture)
        head, *rows = without_empty([HEAD, *(cells(each) for each in comparisons)])
        about = conditions(study)
        text += [f"## {study['question']}", f"{study['paper']}.", f"![{study['question']}]({name})"]
        text += [_markdown_table(head, rows), about]
        encoded = base64.b64encode(picture).decode()
        alt = f'alt="{escape(study["question"])}" style="max-width:100%"'
        image = f'<img {alt} src="data:image/png;base64,{encoded}">'
        shown = html.table(head, [[escape(cell) for cell in row] for row in rows])
        sections.append(html.section(study["question"], escape(study["paper"]), image, shown))
        sections.append(html.soft(escape(about.replace("`", ""))))
    write_text(markdown, ["\n\n".join(text), "\n"])
    write_text(page, [html.document("Results - switchworks lab", sections)])


INTRODUCTION = """# Results

Written by `switchworks lab report` from the files in `experiments/results/`; nothing here is typed.
Intervals are of 95 % over seeds (Student's t; of factors, over their logarithms). A loss is that of
validation text in nats per token, at the end of a whole run with a whole schedule. "Fewer steps" is
the paper's factor: how many times fewer steps an arm needs to the loss that the first arm ends at,
both with runs of several lengths. "In seconds" is that, times the tokens per second of both sides,
measured in turns on a quiet machine."""


def summary(compared: Sequence[tuple[Mapping[str, Any], Sequence[Comparison]]]) -> list[list[str]]:
    """A head, and a row for each arm of which the paper says something."""
    rows = [["paper", "study", "what", "here"]]
    for study, comparisons in compared:
        place = study["paper"].partition(":")[0]
        for each in comparisons:
            if conclusion := each.conclusion():
                rows.append([place, study["study"], each.arm, conclusion])
    return rows


def cells(comparison: Comparison) -> list[str]:
    """A row of the table."""
    factor, in_seconds = comparison.factor, ""
    steps = ""
    if factor is not None:
        times, bound = factor
        more = "more than " if bound else ""
        steps = f"{more}{_numbers(times)}"
        if comparison.per_second is not None:
            scaled = [value * comparison.per_second for value in times[:3]]
            in_seconds = more + _numbers(Interval(scaled[0], scaled[1], scaled[2], times.count))
    gain = "" if comparison.gain is None else _numbers(comparison.gain, 3)
    loss = _numbers(comparison.loss, 3)
    return [comparison.arm, loss, gain, steps, in_seconds, comparison.conclusion()]


def _numbers(values: Interval, digits: int = 2) -> str:
    if values.count < 2:
        return f"{values.mean:.{digits}f}"
    return f"{values.mean:.{digits}f} ({values.low:.{digits}f} to {values.high:.{digits}f})"


def conditions(results: Mapping[str, Any]) -> str:
    """With what the figures were made, in a sentence, and the command that makes them again."""
    runs = results["runs"]
    machines = sorted({str(run["machine"]) for run in runs})
    seeds = len({run["seed"] for run in runs})
    tokens = max(run["tokens"] for run in runs)
    commits = sorted({str(run["commit"])[:12] for run in runs})
    return (
        f"{len(runs)} runs of up to {tokens / 1e6:.1f}M tokens, {seeds} seed{'s' * (seeds > 1)}, "
        f"on {'; '.join(machines)}; commit {', '.join(commits)}. "
        f"Again: `switchworks lab {results['study']}`."
    )


def without_empty(table: Sequence[Sequence[str]]) -> list[list[str]]:
    """`table`, whose first row is its head, without the columns in which nothing else stands."""
    head, *rows = table
    filled = [column for column in range(len(head)) if any(row[column] for row in rows)]
    return [[row[column] for column in filled] for row in table]


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(results: Mapping[str, Any], comparisons: Sequence[Comparison]) -> bytes:
    """A PNG. Of several lengths: the loss of each arm over the tokens of a run, and its factor over
    the same. Of one: the loss of each arm with its interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    several = len(results["steps"]) > 1
    height = 4.0 if several else 1.0 + 0.35 * len(comparisons)
    figure = Figure(figsize=(10, height))
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if several else 1, squeeze=False)[0]
    if several:
        run = results["runs"][0]
        per_step = run["tokens"] / run["steps"] / 1e6
        _draw_losses(panels[0], results, comparisons, per_step)
        _draw_factors(panels[1], results, comparisons, per_step)
        for axes in panels:
            axes.set_xscale("log")
            places = [steps * per_step for steps in results["steps"]]
            axes.set_xticks(places, [f"{place:.3g}" for place in places])
            axes.minorticks_off()
    else:
        _draw_intervals(panels[0], results, comparisons)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, dpi=130, metadata={"Software": None})
    return out.getvalue()


def _draw_losses(
    axes: Any, results: Mapping[str, Any], comparisons: Sequence[Comparison], per_step: float
) -> None:
    """A line for each seed, by the million tokens of its runs."""
    for colour, comparison in zip(COLOURS * 3, comparisons, strict=False):
        for number, by_steps in enumerate(losses(results, comparison.arm).values()):
            name = comparison.arm if number == 0 else None
            x = [steps * per_step for steps in by_steps]
            style = {"color": colour, "label": name, "markersize": 3, "linewidth": 1.2}
            axes.plot(x, list(by_steps.values()), "o-", **style)
    axes.set(xlabel="million tokens of a run", ylabel="validation loss (nats per token)")
    axes.legend(frameon=False, fontsize=8)


def _draw_factors(
    axes: Any, results: Mapping[str, Any], comparisons: Sequence[Comparison], per_step: float
) -> None:
    """How many times fewer steps than the first arm, by the million tokens of that one's runs."""
    for colour, comparison in zip(COLOURS * 3, comparisons, strict=False):
        x = [steps * per_step for steps in comparison.factors]
        times = [factor for factor, _ in comparison.factors.values()]
        axes.plot(x, [f.mean for f in times], "o-", color=colour, markersize=3)
        band = [f.low for f in times], [f.high for f in times]
        axes.fill_between(x, *band, color=colour, alpha=0.2)
    axes.axhline(1.0, color="#999999", linewidth=0.8, linestyle=":")
    first = results["arms"][0]["name"]
    axes.set(xlabel=f"million tokens of a run, {first}", ylabel="times fewer steps to its loss")


def _draw_intervals(
    axes: Any, results: Mapping[str, Any], comparisons: Sequence[Comparison]
) -> None:
    """A row for each arm, the first on top: every seed, and the interval of their mean."""
    for row, (colour, comparison) in enumerate(zip(COLOURS * 3, comparisons, strict=False)):
        loss = comparison.loss
        axes.plot([loss.low, loss.high], [row, row], color=colour, linewidth=5, alpha=0.25)
        seeds = [
            by_steps[comparison.steps] for by_steps in losses(results, comparison.arm).values()
        ]
        axes.plot(seeds, [row] * len(seeds), "o", color=colour, markersize=4)
    axes.set_yticks(range(len(comparisons)), [comparison.arm for comparison in comparisons])
    axes.invert_yaxis()
    axes.set_xlabel("validation loss (nats per token): seeds, and 95 % of their mean")
