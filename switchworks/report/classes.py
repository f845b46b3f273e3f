"""What a classification came to, as HTML: accuracy, classes, confusion, probabilities, answers."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from switchworks.disk import write_text
from switchworks.evaluate import BINS, Answered, Classification, measure_perplexity, wilson
from switchworks.report import html
from switchworks.report.load_chart import ABOVE, BELOW
from switchworks.report.svg import Frame, axes, left_of_numbers, svg

_MOST = 0.7
"""Opacity of a cell that holds its whole row: the ink on it can still be read, light or dark."""


def write_classes_page(
    output: Path, model: str, classifications: Sequence[Classification], command: str
) -> None:
    """Write the page about a model's classifications."""
    names = ", ".join(each.task for each in classifications)
    title = f"{model}: {names}"
    sections = [html.header(title, ["answers to tasks with a closed set of labels"])]
    sections += [classes_section(each, opened=True) for each in classifications]
    sections.append(html.section("To repeat it", "", f"<pre>{escape(command)}</pre>"))
    write_text(output, [html.document(f"{title} - switchworks evaluate", sections)])


def classes_section(result: Classification, run: str = "", *, opened: bool = False) -> str:
    """All about one task; with the name of its `run` where there are several. `opened`: the wrong
    answers are shown at once."""
    rows = f"{result.rows:,}" + (f" of {result.total:,}" if result.rows < result.total else "")
    note = (
        f"{rows} rows of the {escape(result.split)} split. Each answer is the likeliest of the "
        f"{len(result.labels)} labels; its probability is its share of theirs."
    )
    return html.section(
        f"The classes of {result.task}" + (f": {run}" if run else ""),
        note,
        html.tiles(_tiles(result)),
        _baselines(result),
        html.card(_by_class(result)),
        "<h3>Which class is taken for which</h3>",
        html.soft("A row is a class, its cells are the answers, coloured by their share of it."),
        html.card(_confusion(result)),
        html.grid([_probabilities(result)]),
        _answers("Wrong answers", result.wrong, result.rows - result.hits, opened=opened),
        _answers("Right answers", result.right, result.hits),
    )


def _tiles(result: Classification) -> list[html.Tile]:
    low, high = result.interval
    between = f"95 % interval {100 * low:.1f} to {html.percent(high)}"
    macro = sum(f1 for *_, f1, _ in result.by_class()) / len(result.labels)
    guessing = math.log(len(result.labels))
    perplexity = measure_perplexity(result.loss)
    return [
        (
            "Accuracy",
            html.percent(result.hits / result.rows),
            f"{result.hits:,} of {result.rows:,} rows; {between}",
        ),
        *(
            (f"Baseline: {name}", html.percent(hits / result.rows), f"{hits:,} of the same rows")
            for name, hits in result.baselines.items()
        ),
        ("F1, mean of the classes", html.percent(macro), "every class weighs the same"),
        ("Loss", f"{result.loss:.3f}", f"nats per answer; {guessing:.3f} is guessing"),
        ("Perplexity", f"{perplexity:.3f}", "exp of the loss"),
    ]


def _baselines(result: Classification) -> str:
    """A notice of the baselines that the model does not beat; what they are otherwise."""
    if not result.baselines:
        return html.soft("No baselines: they need training rows that are not among these.")
    lines = []
    for name, hits in result.baselines.items():
        share = html.percent(hits / result.rows)
        if hits > result.hits:
            lines.append(f"The baseline {name} is better than this model: {share} of the rows.")
        elif hits == result.hits:
            lines.append(f"The baseline {name} is as good as this model: {share} of the rows.")
        elif wilson(hits, result.rows)[1] > result.interval[0]:
            lines.append(f"The 95 % intervals of this model and of {name} overlap.")
    learned = html.soft(f"The baselines learned from {result.train_rows:,} training rows.")
    return html.notice(*lines) + learned


def _by_class(result: Classification) -> str:
    figures = zip(result.labels, result.by_class(), strict=True)
    rows = [
        [escape(_short(label)), *map(html.percent, (precision, recall, f1)), f"{support:,}"]
        for label, (precision, recall, f1, support) in figures
    ]
    return html.table(["class", "precision", "recall", "F1", "support (rows)"], rows)


def _confusion(result: Classification) -> str:
    head = "".join(_heading(label, 12) for label in result.labels)
    body = ""
    for place, (label, row) in enumerate(zip(result.labels, result.confusion, strict=True)):
        cells = "".join(
            _count(count, count / max(1, sum(row)), BELOW if place == other else ABOVE)
            for other, count in enumerate(row)
        )
        body += f"<tr>{_heading(label, 24)}{cells}</tr>"
    return (
        '<table class="confusion"><thead><tr><th>class &#8595; answer &#8594;</th>'
        f"{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _heading(label: str, most: int) -> str:
    return f'<th title="{escape(label)}">{escape(_short(label, most))}</th>'


def _count(count: int, share: float, rgb: tuple[int, int, int]) -> str:
    colour = ",".join(map(str, (*rgb, f"{_MOST * share:.2f}")))
    return f'<td style="background:rgba({colour})">{count:,}</td>'


def _probabilities(result: Classification) -> str:
    """A histogram of the probabilities of the answers, the wrong ones on top of the right ones."""
    right, wrong = result.bins
    most = max(a + b for a, b in zip(right, wrong, strict=True))
    y = (0.0, 1.08 * most)
    frame = Frame(left_of_numbers(y), 16, 460, 226, (0.0, 1.0), y)
    wide = (frame.right - frame.left) / BINS
    bars = ""
    for place, (hits, misses) in enumerate(zip(right, wrong, strict=True)):
        for kind, base, count in (("right", 0, hits), ("wrong", hits, misses)):
            top, low = frame.down(float(base + count)), frame.down(float(base))
            bars += (
                f'<rect class="{kind}" x="{frame.left + (place + 0.06) * wide:.1f}" y="{top:.1f}" '
                f'width="{0.88 * wide:.1f}" height="{low - top:.1f}">'
                f"<title>{count:,} {kind}, {place / BINS:.1f} to {(place + 1) / BINS:.1f}</title>"
                "</rect>"
            )
    title = "Probabilities of the answers"
    legend = (
        '<div class="legend"><span><i style="color:var(--c0)"></i>right</span>'
        '<span><i style="color:var(--c1)"></i>wrong</span></div>'
    )
    picture = svg(title, 272, axes(frame, "probability of the answer"), bars)
    return html.figure(title, "rows", picture, legend)


def _answers(title: str, answers: Sequence[Answered], total: int, *, opened: bool = False) -> str:
    """Answers with their probabilities, the worst first."""
    texts = "".join(map(_answer, answers))
    shown = f"the worst {len(answers)} of {total:,}" if len(answers) < total else f"all {total:,}"
    return html.details(f"{title}, {shown}", texts, opened=opened) if answers else ""


def _answer(each: Answered) -> str:
    mark = f"{escape(_short(each.answer))} {html.percent(each.probability)}"
    if each.answer == each.truth:
        line = f'<mark class="right">{mark}</mark>'
    else:
        truth = f"{escape(_short(each.truth))} {html.percent(each.truth_probability)}"
        line = f"<mark>{mark}</mark><ins>{truth}</ins>"
    return f'<div class="text">{escape(each.inputs)}<br>{line}</div>'


def _short(label: str, most: int = 40) -> str:
    return label if len(label) <= most else f"{label[: most - 1]}\N{HORIZONTAL ELLIPSIS}"
