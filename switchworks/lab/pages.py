"""The results of all studies as one page of Markdown with pictures, and as one HTML file."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from switchworks.data import atomic_write_text
from switchworks.lab.analysis import Comparison, compare
from switchworks.lab.results import losses
from switchworks.lab.statistics import Interval
from switchworks.report import html

HEAD = ("", "loss (nats)", "ahead by", "fewer steps", "in seconds", "verdict")
COLOURS = ("#4a5a70", "#c4442d", "#d98b2b", "#2f7f6f", "#7a5ba6", "#3d78b8", "#a03a6b")


def write_pages(results: Sequence[Mapping[str, Any]], markdown: Path, page: Path) -> None:
    """Write `markdown`, a picture of each study beside it, and `page`, which holds its pictures."""
    text, sections = [INTRODUCTION], [html.header("Results", ["switchworks lab"])]
    for study in results:
        comparisons = compare(study)
        if not comparisons:
            continue
        picture = draw(study, comparisons)
        name = f"results-{study['study']}.png"
        (markdown.parent / name).write_bytes(picture)
        rows = [cells(comparison) for comparison in comparisons]
        about = conditions(study)
        text += [f"## {study['question']}", f"{study['paper']}.", f"![{study['question']}]({name})"]
        text += [_markdown_table(rows), about]
        encoded = base64.b64encode(picture).decode()
        image = f'<img alt="{escape(study["question"])}" src="data:image/png;base64,{encoded}">'
        shown = html.table(HEAD, [[escape(cell) for cell in row] for row in rows])
        sections.append(html.section(study["question"], escape(study["paper"]), image, shown))
        sections.append(html.soft(escape(about)))
    atomic_write_text(markdown, ["\n\n".join(text), "\n"])
    atomic_write_text(page, [html.document("Results - switchworks lab", sections)])


INTRODUCTION = """# Results

Written by `switchworks lab report` from the files in `experiments/results/`; nothing here is typed.
Intervals are of 95 % over seeds (Student's t; of factors, over their logarithms). A loss is that of
held-out text in nats per token, at the end of a whole run with a whole schedule. "Fewer steps" is
the paper's factor: how many times fewer steps an arm needs to the loss that the first arm ends at,
both with runs of several lengths. "In seconds" is that, times the tokens per second of both sides,
measured in turns on a quiet machine."""


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


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(results: Mapping[str, Any], comparisons: Sequence[Comparison]) -> bytes:
    """A PNG: the loss of each arm over the tokens of a run, and its factor over the same."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    FigureCanvasAgg(figure)
    with_factors = any(comparison.factors for comparison in comparisons)
    axes = figure.subplots(1, 2 if with_factors else 1, squeeze=False)[0]
    per_step = results["runs"][0]["tokens"] / results["runs"][0]["steps"] / 1e6
    for colour, comparison in zip(COLOURS * 3, comparisons, strict=False):
        mine = list(losses(results, comparison.arm).values())
        for number, by_steps in enumerate(mine):
            x, y = zip(*((steps * per_step, loss) for steps, loss in by_steps.items()), strict=True)
            name = comparison.arm if number == 0 else None
            axes[0].plot(x, y, "o-", color=colour, label=name, markersize=3, linewidth=1.2)
        if comparison.factors:
            x = [steps * per_step for steps in comparison.factors]
            factors = [times for times, _ in comparison.factors.values()]
            axes[1].plot(x, [f.mean for f in factors], "o-", color=colour, markersize=3)
            axes[1].fill_between(
                x, [f.low for f in factors], [f.high for f in factors], color=colour, alpha=0.2
            )
    axes[0].set(xscale="log", xlabel="million tokens of a run", ylabel="held-out loss (nats)")
    axes[0].legend(frameon=False, fontsize=8)
    if with_factors:
        first = results["arms"][0]["name"]
        axes[1].axhline(1.0, color="#999999", linewidth=0.8, linestyle=":")
        label = f"million tokens of a run of {first}"
        axes[1].set(xscale="log", xlabel=label, ylabel="times fewer steps to its loss")
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, dpi=130, metadata={"Software": None})
    return out.getvalue()
