"""The HTML page about one run or several: its sections, and in which order they stand."""

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np

from switchworks.config import DataError
from switchworks.report.charts import COLOURS, Curve, Kind, curves_of, line_chart
from switchworks.report.figures import by_corpus, compact, figures, gains, recorded, speedups
from switchworks.report.html import (
    card,
    cell,
    details,
    document,
    grid,
    header,
    notice,
    section,
    table,
    tiles,
    write_page,
)
from switchworks.report.load_chart import colour_bar, load_chart
from switchworks.report.runs import Run, baseline, last_part, read_run
from switchworks.report.samples import samples_section
from switchworks.report.tasks import best_mark, best_sentence, task_charts, task_rows

LOSS_UNIT = "nats per target token"


def write_report(run_dirs: Sequence[Path], output: Path | None = None) -> Path:
    """Write one self-contained HTML page about the runs in `run_dirs`, and return where it is.

    By default the page is report.html in the run directory, or for several runs comparison.html
    in the first of them. Raises DataError for a directory that holds no run.
    """
    if not run_dirs:
        raise DataError("A report needs at least one run directory. Name the one to report on.")
    runs = [read_run(Path(path)) for path in run_dirs]
    name = "report.html" if len(runs) == 1 else "comparison.html"
    target = runs[0].path / name if output is None else Path(output)
    write_page(target, page(runs))
    return target


def page(runs: Sequence[Run]) -> str:
    """The page as HTML. Sections for which the runs have no data are left out."""
    runs = _with_distinct_names(runs)
    facts = [fact for fact in _facts(runs[0]) if all(fact in _facts(run) for run in runs)]
    names = ", ".join(run.name for run in runs)
    sections = [header(names, facts), *(_problems(run) for run in runs)]
    if len(runs) > 1:
        sections.append(_comparison(runs))
    elif runs[0].rows:
        sections.append(tiles(figures(runs[0])))
    sections += [_learning(runs), _tasks(runs), _corpora(runs), _speed(runs), _routing(runs)]
    sections += [_loads(run, several=len(runs) > 1) for run in runs]
    sections += [samples_section(run, several=len(runs) > 1) for run in runs]
    sections += [_origin(runs), _settings(runs)]
    return document(f"{names} - switchworks report", sections)


def _with_distinct_names(runs: Sequence[Run]) -> list[Run]:
    """Runs of one name, such as two seeds of a recipe, get their directories added to it."""
    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.name} ({run.path.resolve().name})")
        if names.count(run.name) > 1
        else run
        for run in runs
    ]


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


def _problems(run: Run) -> str:
    """What could not be read of the run, and whether it has finished."""
    problems = list(run.notes)
    if not run.rows:
        problems.append("No metrics yet: metrics.jsonl holds no readable line.")
    else:
        planned, done = run.settings.get("steps"), run.rows[-1]["step"]
        if isinstance(planned, int) and done < planned:
            problems.append(f"Not finished: step {done:,} of {planned:,} so far.")
    return notice(*(f"{run.path.name}: {problem}" for problem in problems))


def _comparison(runs: Sequence[Run]) -> str:
    columns = [{name: (value, note) for name, value, note in figures(run)} for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [_figure_row(name, [column.get(name) for column in columns]) for name in names]
    rows += [[escape(text) for text in row] for row in speedups(runs)]
    return section(
        "Comparison", "", tiles(gains(runs)), _definition_of_speedup(runs), _by_run(runs, rows)
    )


def _by_run(runs: Sequence[Run], rows: Sequence[Sequence[str]]) -> str:
    """A table with a column per run."""
    return card(table(["", *(run.name for run in runs)], rows))


def _figure_row(name: str, values: Sequence[tuple[str, str] | None]) -> list[str]:
    """A figure of every run; a note that all runs share stands once, beside the name."""
    notes = {note for _, note in filter(None, values)}
    shared = notes.pop() if len(notes) == 1 else ""
    pairs = [("-", "") if value is None else value for value in values]
    return [
        cell(name, shared),
        *(cell(value, "" if note == shared else note) for value, note in pairs),
    ]


def _definition_of_speedup(runs: Sequence[Run]) -> str:
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


def _losses(runs: Sequence[Run], against: str, unit: int | float) -> list[Curve]:
    """Training and validation loss of every run; x in units of `unit`."""
    curves: list[Curve] = []
    single = len(runs) == 1
    kinds: dict[str, Kind] = {"training": "noisy" if single else "smooth", "validation": "points"}
    for colour, run in enumerate(runs):
        for name, kind in kinds.items():
            x, y = run.series("train/loss" if name == "training" else "val/loss", against)
            label = name if single else f"{run.name}, {name}"
            place = len(curves) if single else colour  # a colour for each curve, or for each run
            curves.append(Curve(x=x / unit, y=y, label=label, colour=place, kind=kind))
    return curves


def _learning(runs: Sequence[Run]) -> str:
    longest = max(run.last("seconds") or 0.0 for run in runs)
    most = max(run.last("tokens") or 0.0 for run in runs)
    seconds, clock = next(
        pair
        for pair in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
        if longest >= 3 * pair[0] or pair[0] == 1
    )
    tokens, magnitude = (1e9, "billion") if most >= 2e9 else (1e6, "million")
    by_step, by_time = _losses(runs, "step", 1), _losses(runs, "seconds", seconds)
    by_tokens, rate = _losses(runs, "tokens", tokens), curves_of(runs, "train/lr", kind="plain")
    charts = [
        line_chart("Loss by step", LOSS_UNIT, "step", by_step, mark=best_mark(runs)),
        line_chart("Loss by time", LOSS_UNIT, f"training time, {clock}", by_time),
        line_chart("Loss by tokens", LOSS_UNIT, f"tokens seen, {magnitude}", by_tokens),
        line_chart("Learning rate", "", "step", rate, from_zero=True),
    ]
    note = "Lower is better. Training loss is smoothed"
    note += ", with its raw values behind." if len(runs) == 1 else "."
    return section("How it learned", note, grid(charts))


def _tasks(runs: Sequence[Run]) -> str:
    """Every task's metrics as measured while training, and which step was the best."""
    charts = task_charts(runs)
    sentences = [
        escape((f"{run.name}: " if len(runs) > 1 else "") + sentence)
        for run in runs
        if (sentence := best_sentence(run))
    ]
    if not charts:
        text = f'<p class="soft">{" ".join(sentences)}</p>'
        return f"<section>{text}</section>" if sentences else ""
    sentences.insert(0, "Answers to the same validation examples, out of 100; higher is better.")
    rows = [[cell(*pair) for pair in row] for row in task_rows(runs)]
    return section("The tasks", " ".join(sentences), grid(charts), _by_run(runs, rows))


def _corpora(runs: Sequence[Run]) -> str:
    """The loss on each corpus of a mixture; curves for one run, if there are colours enough."""
    losses = by_corpus(runs)
    if not losses:
        return ""
    chart = ""
    if len(runs) == 1 and len(losses) <= COLOURS:
        keys = {name: f"val/loss/{name}" for name in losses}
        curves = [
            replace(curve, label=name, colour=colour)
            for colour, (name, key) in enumerate(keys.items())
            for curve in curves_of(runs, key, kind="points")
        ]
        chart = line_chart("Validation loss by corpus", LOSS_UNIT, "step", curves)
    note = (
        "The last validation loss on each. The validation loss of the run is their mean, each "
        "weighted by its share of the rows."
    )
    rows = [_figure_row(name, values) for name, values in losses.items()]
    return section("The corpora", note, f'<div class="grid">{chart}</div>', _by_run(runs, rows))


def _speed(runs: Sequence[Run]) -> str:
    throughput, norm = curves_of(runs, "tokens_per_second"), curves_of(runs, "train/grad_norm")
    charts = [
        line_chart("Throughput", "tokens per second", "step", throughput, from_zero=True),
        line_chart("Gradient norm", "over all parameters", "step", norm, from_zero=True),
    ]
    return section("How it ran", "Speed, and the size of the gradients.", grid(charts))


def _routing(runs: Sequence[Run]) -> str:
    if not any(run.sparse for run in runs):
        return ""
    balance, dropped = curves_of(runs, "train/balance"), curves_of(runs, "train/dropped", scale=100)
    used, sure = curves_of(runs, "train/experts_in_use"), curves_of(runs, "train/confidence")
    z = curves_of(runs, "train/router_z")
    experts = max((loads.shape[1] for run in runs for _, loads in run.loads().values()), default=0)
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
    note = (
        "Every switch layer sends each token to one expert. A token that finds its expert full is "
        "dropped: it passes the layer unchanged."
    )
    return section("How it routed", note, grid(charts))


def _busiest(runs: Sequence[Run]) -> list[Curve]:
    """Per run, the greatest load of any expert in any layer: a step waits for that expert."""
    curves = []
    for colour, run in enumerate(runs):
        greatest: dict[float, float] = {}
        for steps, loads in run.loads().values():
            for step, load in zip(steps.tolist(), loads.max(axis=1).tolist(), strict=True):
                greatest[step] = max(load, greatest.get(step, 0.0))
        x, y = np.array(sorted(greatest)), np.array([greatest[step] for step in sorted(greatest)])
        kind = "noisy" if len(runs) == 1 else "smooth"
        curves.append(Curve(x=x, y=y, label=run.name, colour=colour, kind=kind))
    return curves


def _loads(run: Run, *, several: bool) -> str:
    """A heat map and final bars for each switch layer, the bars to one scale."""
    loads = run.loads()
    if not loads:
        return ""
    ends = {layer: last_part(shares).mean(axis=0) for layer, (_, shares) in loads.items()}
    most = max(2.0, *(1.05 * float(end.max()) for end in ends.values()))
    charts = []
    for layer, (steps, shares) in loads.items():
        end, dropped = ends[layer], run.settled(f"dropped/{layer}")
        note = f"busiest {end.max():.2f} (expert {end.argmax()})"
        note += f", idlest {end.min():.2f} (expert {end.argmin()})"
        if dropped is not None:
            note += f", {100 * dropped:.2f}\N{NO-BREAK SPACE}% dropped"
        charts.append(load_chart(layer, steps, shares, note=note, most=most))
    note = (
        "Each expert's share of the tokens, as a multiple of the even share. One row is one "
        "expert; the bars are the mean of the last tenth of the run."
    )
    title = "Load of the experts" + (f": {run.name}" if several else "")
    return section(title, note, colour_bar(), grid(charts))


def _origin(runs: Sequence[Run]) -> str:
    names = {
        "started": "Started", "machine": "Machine", "threads": "Threads", "torch": "torch",
        "version": "switchworks", "text": "Text", "train_tokens": "Tokens in the store",
        "vocabulary": "Vocabulary",
    }  # fmt: skip
    rows = [
        [title, *(cell(_value(run.about.get(key, "-"))) for run in runs)]
        for key, title in names.items()
        if any(key in run.about for run in runs)
    ]
    commands = [str(run.about["command"]) for run in runs if run.about.get("command")]
    origin = (
        f"<pre>{escape(chr(10).join(commands))}</pre>"
        if commands
        else '<p class="soft">The command was not noted. experiment.toml in the run directory '
        "holds every setting.</p>"
    )
    origins = table(["", *(run.name for run in runs)], rows) if rows else ""
    return section("To repeat it", "", origin, f'<div class="scroll">{origins}</div>')


def _value(value: object) -> str:
    return f"{value:,}" if type(value) is int else str(value)


def _settings(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    if not names:
        return ""
    rows = [[name, *(str(run.settings.get(name, "-")) for run in runs)] for name in names]
    differing = [number for number, row in enumerate(rows) if len(set(row[1:])) > 1]
    cells = [list(map(escape, row)) for row in rows]
    summary = "All settings" + ("; those that differ are marked" if len(runs) > 1 else "")
    head = ["", *(run.name for run in runs)]
    return f"<section>{details(summary, table(head, cells, marked=differing))}</section>"
