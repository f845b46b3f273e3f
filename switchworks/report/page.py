"""The HTML page of a report: what is said about the runs, and in which order."""

from collections.abc import Sequence
from dataclasses import replace
from html import escape

import numpy as np

from switchworks.report.charts import COLOURS, Curve, line_chart
from switchworks.report.document import document
from switchworks.report.figures import (
    Figure,
    by_corpus,
    compact,
    figures,
    gains,
    recorded,
    speedups,
)
from switchworks.report.load_chart import colour_bar, load_chart
from switchworks.report.runs import Run, baseline, last_part
from switchworks.report.samples import samples_section
from switchworks.report.tasks import best_mark, said_of_best, task_charts, task_rows


def page(runs: Sequence[Run]) -> str:
    """What there is to say about the runs, in a document of its own."""
    runs = _told_apart(runs)
    sections = [_header(runs), *(_notes(run) for run in runs)]
    if len(runs) > 1:
        sections.append(_comparison(runs))
    elif runs[0].rows:
        sections.append(_tiles(figures(runs[0])))
    sections += [_learning(runs), _tasks(runs), _corpora(runs), _speed(runs), _routing(runs)]
    sections += [_loads(run, several=len(runs) > 1) for run in runs]
    sections += [samples_section(run, several=len(runs) > 1) for run in runs]
    sections += [_origin(runs), _settings(runs)]
    names = ", ".join(run.name for run in runs)
    return document(f"{names} - switchworks report", sections)


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs with distinct names: two seeds of one recipe have the same."""
    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.name} ({run.path.resolve().name})")
        if names.count(run.name) > 1
        else run
        for run in runs
    ]


def _header(runs: Sequence[Run]) -> str:
    facts = [fact for fact in _facts(runs[0]) if all(fact in _facts(run) for run in runs)]
    names = escape(", ".join(run.name for run in runs))
    said = escape(" \N{MIDDLE DOT} ".join(facts))
    return f'<header><h1>{names}</h1><p class="soft">{said}</p></header>'


def _facts(run: Run) -> list[str]:
    tokens, vocabulary = recorded(run, "train_tokens"), recorded(run, "vocabulary")
    facts = [
        str(run.about.get("text", "")),
        f"{compact(tokens)} tokens" if tokens else "",
        f"vocabulary of {vocabulary:,}" if vocabulary else "",
        str(run.about.get("machine", "")),
        str(run.about.get("started", ""))[:16].replace("T", " "),
    ]
    return [fact for fact in facts if fact]


def _notes(run: Run) -> str:
    notes = list(run.notes)
    if not run.rows:
        notes.append("No metrics yet: metrics.jsonl holds no readable line.")
    else:
        planned, done = run.settings.get("steps"), run.rows[-1]["step"]
        if isinstance(planned, int) and done < planned:
            notes.append(f"Not finished: step {done:,} of {planned:,} so far.")
    said = "<br>".join(escape(f"{run.path.name}: {note}") for note in notes)
    return f'<div class="card notice">{said}</div>' if notes else ""


def _tiles(found: Sequence[Figure]) -> str:
    return (
        '<section class="tiles">'
        + "".join(
            f'<div class="tile"><div>{escape(name)}</div><b>{escape(value)}</b>'
            f"<small>{escape(note)}</small></div>"
            for name, value, note in found
        )
        + "</section>"
    )


def _comparison(runs: Sequence[Run]) -> str:
    columns = [{name: (value, note) for name, value, note in figures(run)} for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [_figure_row(name, [column.get(name) for column in columns]) for name in names]
    rows += [[escape(cell) for cell in row] for row in speedups(runs)]
    return (
        "<section><h2>Comparison</h2>"
        + _tiles(gains(runs))
        + _said_in_words(runs)
        + '<div class="card scroll">'
        + _table(["", *(run.name for run in runs)], rows)
        + "</div></section>"
    )


def _figure_row(name: str, found: Sequence[tuple[str, str] | None]) -> list[str]:
    """A figure of every run; what is to be known about it stands once if it is the same for all."""
    notes = {note for _, note in filter(None, found)}
    shared = notes.pop() if len(notes) == 1 else ""
    cells = [("-", "") if cell is None else cell for cell in found]
    return [
        _cell(name, shared),
        *(_cell(value, "" if note == shared else note) for value, note in cells),
    ]


def _cell(value: str, note: str = "") -> str:
    return escape(value) + (f"<br><small>{escape(note)}</small>" if note else "")


def _said_in_words(runs: Sequence[Run]) -> str:
    base = baseline(runs)
    target = base.last("val/loss")
    if target is None:
        return ""
    return (
        f'<p class="soft">Speed-up, as in the Switch Transformer paper: the steps (or the seconds '
        f"of training) {escape(base.name)} took to its final validation loss of {target:.3f}, "
        "divided by those another run took to come down to the same loss. Between two validations "
        "the loss is taken to fall in a straight line.</p>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the cells of `rows` are HTML already, and the first of a row names it."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr><th>{row[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _section(title: str, said: str, charts: Sequence[str]) -> str:
    if not any(charts):
        return ""
    return (
        f'<section><h2>{escape(title)}</h2><p class="soft">{escape(said)}</p>'
        f'<div class="grid">{"".join(charts)}</div></section>'
    )


def _curves(runs: Sequence[Run], key: str, *, plain: bool = False, scale: int = 1) -> list[Curve]:
    """`key` against steps, one curve per run."""
    curves = []
    for colour, run in enumerate(runs):
        x, y = run.series(key)
        kind = "plain" if plain else "noisy" if len(runs) == 1 else "smooth"
        curves.append(Curve(x=x, y=y * scale, label=run.name, colour=colour, kind=kind))
    return curves


def _losses(runs: Sequence[Run], against: str, unit: int | float) -> list[Curve]:
    """Training and validation loss of every run; x in units of `unit`."""
    curves = []
    alone = len(runs) == 1
    for colour, run in enumerate(runs):
        x, y = run.series("train/loss", against)
        label = "training" if alone else f"{run.name}, training"
        kind = "noisy" if alone else "smooth"
        curves.append(Curve(x=x / unit, y=y, label=label, colour=colour, kind=kind))
        x, y = run.series("val/loss", against)
        label = "validation" if alone else f"{run.name}, validation"
        curves.append(
            Curve(x=x / unit, y=y, label=label, colour=1 if alone else colour, kind="points")
        )
    return curves


def _learning(runs: Sequence[Run]) -> str:
    longest = max(run.last("seconds") or 0.0 for run in runs)
    most = max(run.last("tokens") or 0.0 for run in runs)
    seconds, clock = next(
        pair
        for pair in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
        if longest >= 3 * pair[0] or pair[0] == 1
    )
    tokens, many = (1e9, "billion") if most >= 2e9 else (1e6, "million")
    unit, rate = "nats per target token", _curves(runs, "train/lr", plain=True)
    by_time, by_tokens = _losses(runs, "seconds", seconds), _losses(runs, "tokens", tokens)
    charts = [
        line_chart("Loss by step", unit, "step", _losses(runs, "step", 1), mark=best_mark(runs)),
        line_chart("Loss by time", unit, f"training time, {clock}", by_time),
        line_chart("Loss by tokens", unit, f"tokens seen, {many}", by_tokens),
        line_chart("Learning rate", "", "step", rate, from_zero=True),
    ]
    said = "Lower is better. Training loss is smoothed"
    said += ", with its raw values behind." if len(runs) == 1 else "."
    return _section("How it learned", said, charts)


def _tasks(runs: Sequence[Run]) -> str:
    """Every task's metrics as measured while training, and which step was the best."""
    charts = task_charts(runs)
    said = [
        (f"{run.name}: " if len(runs) > 1 else "") + text
        for run in runs
        if (text := said_of_best(run))
    ]
    if not charts:
        return f'<section><p class="soft">{escape(" ".join(said))}</p></section>' if said else ""
    said.insert(0, "Answers to the same validation examples, out of 100; higher is better.")
    rows = [[_cell(*cell) for cell in row] for row in task_rows(runs)]
    return (
        f'<section><h2>The tasks</h2><p class="soft">{escape(" ".join(said))}</p>'
        f'<div class="grid">{"".join(charts)}</div><div class="card scroll">'
        + _table(["", *(run.name for run in runs)], rows)
        + "</div></section>"
    )


def _corpora(runs: Sequence[Run]) -> str:
    """What runs of a mixture came to on each corpus; curves where they can be told apart."""
    found = by_corpus(runs)
    if not found:
        return ""
    chart = ""
    if len(runs) == 1 and len(found) <= COLOURS:
        curves = [
            Curve(x=x, y=y, label=name, colour=colour, kind="points")
            for colour, name in enumerate(found)
            for x, y in [runs[0].series(f"val/loss/{name}")]
        ]
        chart = line_chart("Validation loss by corpus", "nats per target token", "step", curves)
    rows = [_figure_row(name, cells) for name, cells in found.items()]
    return (
        '<section><h2>The corpora</h2><p class="soft">The last validation loss on each. The '
        "validation loss of the run is their mean, each weighted by its share of the rows.</p>"
        f'<div class="grid">{chart}</div><div class="card scroll">'
        + _table(["", *(run.name for run in runs)], rows)
        + "</div></section>"
    )


def _speed(runs: Sequence[Run]) -> str:
    throughput, norm = _curves(runs, "tokens_per_second"), _curves(runs, "train/grad_norm")
    charts = [
        line_chart("Throughput", "tokens per second", "step", throughput, from_zero=True),
        line_chart("Gradient norm", "over all parameters", "step", norm, from_zero=True),
    ]
    return _section("How it ran", "Speed, and the size of the gradients.", charts)


def _routing(runs: Sequence[Run]) -> str:
    if not any(run.sparse for run in runs):
        return ""
    balance, dropped = _curves(runs, "train/balance"), _curves(runs, "train/dropped", scale=100)
    used, sure = _curves(runs, "train/experts_in_use"), _curves(runs, "train/confidence")
    z = _curves(runs, "train/router_z")
    experts = max((table.shape[1] for run in runs for _, table in run.loads().values()), default=0)
    all_used = (float(experts), f"all {experts}") if experts else None
    charts = [
        line_chart(
            "Balance", "1 = even, E = all tokens to one expert", "step", balance,
            reference=(1.0, "even"),
        ),
        line_chart("Dropped tokens", "% of tokens", "step", dropped, from_zero=True),
        line_chart("Busiest expert", "times the even share, of all layers", "step", _busiest(runs),
            from_zero=True, reference=(1.0, "even")),
        line_chart("Experts in use", "mean over layers", "step", used, from_zero=True,
            reference=all_used),
        line_chart("Confidence", "probability of the chosen expert", "step", sure, from_zero=True),
        line_chart("Router z", "squared log-sum-exp of its logits", "step", z, from_zero=True),
    ]  # fmt: skip
    said = (
        "Every switch layer sends each token to one expert. A token that finds its expert full is "
        "dropped: it passes the layer unchanged."
    )
    return _section("How it routed", said, charts)


def _busiest(runs: Sequence[Run]) -> list[Curve]:
    """Per run, the greatest load of any expert in any layer: what a step has to wait for."""
    curves = []
    for colour, run in enumerate(runs):
        greatest: dict[float, float] = {}
        for steps, table in run.loads().values():
            for step, load in zip(steps.tolist(), table.max(axis=1).tolist(), strict=True):
                greatest[step] = max(load, greatest.get(step, 0.0))
        x, y = np.array(sorted(greatest)), np.array([greatest[step] for step in sorted(greatest)])
        kind = "noisy" if len(runs) == 1 else "smooth"
        curves.append(Curve(x=x, y=y, label=run.name, colour=colour, kind=kind))
    return curves


def _loads(run: Run, *, several: bool) -> str:
    loads = run.loads()
    if not loads:
        return ""
    ends = {layer: last_part(table).mean(axis=0) for layer, (_, table) in loads.items()}
    most = max(2.0, *(1.05 * float(end.max()) for end in ends.values()))
    charts = []
    for layer, (steps, table) in loads.items():
        end, dropped = ends[layer], run.settled(f"dropped/{layer}")
        note = f"busiest {end.max():.2f} (expert {end.argmax()})"
        note += f", idlest {end.min():.2f} (expert {end.argmin()})"
        if dropped is not None:
            note += f", {100 * dropped:.2f}\N{NO-BREAK SPACE}% dropped"
        charts.append(load_chart(layer, steps, table, note=note, most=most))
    title = "Load of the experts" + (f": {run.name}" if several else "")
    return (
        f'<section><h2>{escape(title)}</h2><p class="soft">Each expert\'s share of the tokens, as '
        "a multiple of the even share. One row is one expert; the bars are the mean of the last "
        f'tenth of the run.</p>{colour_bar()}<div class="grid">{"".join(charts)}</div></section>'
    )


def _origin(runs: Sequence[Run]) -> str:
    names = {
        "started": "Started", "machine": "Machine", "threads": "Threads", "torch": "torch",
        "version": "switchworks", "text": "Text", "train_tokens": "Tokens in the store",
        "vocabulary": "Vocabulary",
    }  # fmt: skip
    rows = [
        [title, *(_cell(_plain(run.about.get(key, "-"))) for run in runs)]
        for key, title in names.items()
        if any(key in run.about for run in runs)
    ]
    commands = [str(run.about["command"]) for run in runs if run.about.get("command")]
    said = (
        f"<pre>{escape(chr(10).join(commands))}</pre>"
        if commands
        else '<p class="soft">The command was not noted. experiment.toml in the run directory '
        "holds every setting.</p>"
    )
    table = _table(["", *(run.name for run in runs)], rows) if rows else ""
    return f'<section><h2>To repeat it</h2>{said}<div class="scroll">{table}</div></section>'


def _plain(value: object) -> str:
    return f"{value:,}" if type(value) is int else str(value)


def _settings(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    if not names:
        return ""
    rows = []
    for name in names:
        values = [str(run.settings.get(name, "-")) for run in runs]
        mark = ' class="differs"' if len(set(values)) > 1 else ""
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        rows.append(f"<tr{mark}><th>{escape(name)}</th>{cells}</tr>")
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    said = "All settings" + ("; those that differ are marked" if len(runs) > 1 else "")
    return (
        f'<section><details class="card"><summary>{said}</summary><div class="scroll"><table>'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        "</details></section>"
    )
