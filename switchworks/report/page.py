"""The HTML page about one run or several: its sections, and in which order they stand."""

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np

from switchworks.config import DataError
from switchworks.disk import well_formed, write_text
from switchworks.report import html
from switchworks.report.charts import Curve, Kind, Mark, curves_of, line_chart, points_of
from switchworks.report.figures import by_corpus, compact, figures, recorded, speedups
from switchworks.report.load_chart import colour_bar, load_chart
from switchworks.report.runs import Run, baseline, last_part, read_run
from switchworks.report.samples import samples_section
from switchworks.report.svg import COLOURS
from switchworks.report.tasks import best_mark, tasks_section

LOSS_UNIT = "nats per target token"


def write_report(run_dirs: Sequence[Path], output: Path | None = None) -> Path:
    """Write one self-contained HTML page about the runs in `run_dirs`, and return where it is. By
    default the page is report.html in the run directory, or for several runs comparison.html in the
    first of them. Raises DataError for a directory that holds no run."""
    if not run_dirs:
        raise DataError("A report needs at least one run directory. Name the one to report on.")
    runs = [read_run(Path(path)) for path in run_dirs]
    name = "report.html" if len(runs) == 1 else "comparison.html"
    target = runs[0].path / name if output is None else Path(output)
    label = ", ".join(str(run.path) for run in runs)
    with well_formed(f"The files in {label}", DataError, "Leave out what was edited by hand."):
        text = page(runs)
    write_text(target, [text])
    return target


def page(runs: Sequence[Run]) -> str:
    """The page as HTML. Sections for which the runs have no data are left out."""
    runs, several = _with_distinct_names(runs), len(runs) > 1
    facts = [fact for fact in _facts(runs[0]) if all(fact in _facts(run) for run in runs)]
    names = ", ".join(run.name for run in runs)
    sections = [html.header(names, facts), *(_problems(run) for run in runs)]
    if several:
        sections.append(_comparison(runs))
    elif runs[0].rows:
        sections.append(html.tiles(figures(runs[0])))
    sections += [_learning(runs), tasks_section(runs), _corpora(runs), _speed(runs), _routing(runs)]
    sections += [_loads(run, several=several) for run in runs]
    sections += [samples_section(run, several=several) for run in runs]
    sections += [_origin(runs), _settings(runs)]
    return html.document(f"{names} - switchworks report", sections)


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
    problems, planned = list(run.notes), run.settings.get("steps")
    if not run.rows:
        problems.append("No metrics yet: metrics.jsonl holds no readable line.")
    elif isinstance(planned, int) and run.rows[-1]["step"] < planned:
        done = run.rows[-1]["step"]
        problems.append(f"Not finished: step {done:,} of {planned:,} so far.")
    return html.notice(*(f"{run.path.name}: {problem}" for problem in problems))


def _comparison(runs: Sequence[Run]) -> str:
    columns = [{name: (value, note) for name, value, note in figures(run)} for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [html.row(name, [column.get(name) for column in columns]) for name in names]
    base = baseline(runs)
    target, tiles, definition = base.last("val/loss"), [], ""
    if target is not None:
        tiles, speedup_rows = speedups(runs, base, target)
        rows += [list(map(escape, row)) for row in speedup_rows]
        definition = html.soft(
            "Speed-up, as in the Switch Transformer paper: the steps (or the seconds of training) "
            f"{escape(base.name)} took to its final validation loss of {target:.3f}, divided by "
            "those another run took to come down to the same loss. Between two validations the "
            "loss is taken to fall in a straight line."
        )
    by_run = html.card(html.table(_head(runs), rows))
    return html.section("Comparison", "", html.tiles(tiles), definition, by_run)


def _head(runs: Sequence[Run]) -> list[str]:
    return ["", *(run.name for run in runs)]


def _losses(runs: Sequence[Run], against: str, unit: float = 1) -> list[Curve]:
    curves: list[Curve] = []
    single = len(runs) == 1
    noisy: Kind = "noisy" if single else "smooth"
    lines: list[tuple[str, str, Kind]] = [("training", "train/loss", noisy)]
    lines.append(("validation", "val/loss", "points"))
    for place, run in enumerate(runs):
        for name, key, kind in lines:
            x, y = run.series(key, against)
            label = name if single else f"{run.name}, {name}"
            colour = len(curves) if single else place  # one for each curve, or for each run
            curves.append(Curve(x=x / unit, y=y, label=label, colour=colour, kind=kind))
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
    by_step, by_time = _losses(runs, "step"), _losses(runs, "seconds", seconds)
    by_tokens, rate = _losses(runs, "tokens", tokens), curves_of(runs, "train/lr", kind="plain")
    charts = [
        line_chart("Loss by step", LOSS_UNIT, "step", by_step, mark=best_mark(runs)),
        line_chart("Loss by time", LOSS_UNIT, f"training time, {clock}", by_time),
        line_chart("Loss by tokens", LOSS_UNIT, f"tokens seen, {magnitude}", by_tokens),
        line_chart("Learning rate", "", "step", rate, from_zero=True),
    ]
    note = "Lower is better. Training loss is smoothed"
    note += ", with its raw values behind." if len(runs) == 1 else "."
    return html.section("How it learned", note, html.grid(charts))


def _corpora(runs: Sequence[Run]) -> str:
    """The loss on each corpus of a mixture; curves for one run, if there are colours enough."""
    losses = by_corpus(runs)
    if not losses:
        return ""
    chart = ""
    if len(runs) == 1 and len(losses) <= COLOURS:
        curves = points_of(runs[0], {name: f"val/loss/{name}" for name in losses})
        chart = line_chart("Validation loss by corpus", LOSS_UNIT, "step", curves)
    note = (
        "The last validation loss on each. The validation loss of the run is their mean, each "
        "weighted by its share of the rows."
    )
    rows = [html.row(name, values) for name, values in losses.items()]
    by_run = html.card(html.table(_head(runs), rows))
    return html.section("The corpora", note, html.grid([chart]), by_run)


def _chart(
    runs: Sequence[Run], name: str, unit: str, key: str, *, scale: int = 1, line: Mark | None = None
) -> str:
    curves = curves_of(runs, key, scale=scale)
    return line_chart(name, unit, "step", curves, from_zero=True, reference=line)


def _speed(runs: Sequence[Run]) -> str:
    charts = [
        _chart(runs, "Throughput", "tokens per second", "tokens_per_second"),
        _chart(runs, "Gradient norm", "over all parameters", "train/grad_norm"),
    ]
    return html.section("How it ran", "Speed, and the size of the gradients.", html.grid(charts))


def _routing(runs: Sequence[Run]) -> str:
    if not any(run.sparse for run in runs):
        return ""
    experts = max((loads.shape[1] for run in runs for _, loads in run.loads().values()), default=0)
    even, used = (1.0, "even"), (float(experts), f"all {experts}") if experts else None
    balance, busiest = curves_of(runs, "train/balance"), _busiest(runs)
    by_balance, by_load = (
        "1 = even, E = all tokens to one expert",
        "times the even share, of all layers",
    )
    charts = [
        line_chart("Balance", by_balance, "step", balance, reference=even),
        _chart(runs, "Dropped tokens", "% of tokens", "train/dropped", scale=100),
        line_chart("Busiest expert", by_load, "step", busiest, from_zero=True, reference=even),
        _chart(runs, "Experts in use", "mean over layers", "train/experts_in_use", line=used),
        _chart(runs, "Confidence", "probability of the chosen expert", "train/confidence"),
        _chart(runs, "Router z", "squared log-sum-exp of its logits", "train/router_z"),
    ]
    note = (
        "Every switch layer sends each token to one expert. A token that finds its expert full is "
        "dropped: it passes the layer unchanged."
    )
    return html.section("How it routed", note, html.grid(charts))


def _busiest(runs: Sequence[Run]) -> list[Curve]:
    """Per run, the greatest load of any expert in any layer: a step waits for that expert."""
    curves = []
    for colour, run in enumerate(runs):
        greatest: dict[float, float] = {}
        for steps, loads in run.loads().values():
            for step, load in zip(steps.tolist(), loads.max(axis=1).tolist(), strict=True):
                greatest[step] = max(load, greatest.get(step, 0.0))
        x, y = np.array(sorted(greatest.items())).reshape(-1, 2).T
        kind = "noisy" if len(runs) == 1 else "smooth"
        curves.append(Curve(x=x, y=y, label=run.name, colour=colour, kind=kind))
    return curves


def _loads(run: Run, *, several: bool) -> str:
    """A heat map and final bars for each switch layer, the bars to one scale."""
    loads = run.loads()
    ends = {layer: last_part(shares).mean(axis=0) for layer, (_, shares) in loads.items()}
    most = max([2.0, *(1.05 * float(end.max()) for end in ends.values())])
    charts = []
    for layer, (steps, shares) in loads.items():
        end, dropped = ends[layer], run.settled(f"dropped/{layer}")
        note = f"busiest {end.max():.2f} (expert {end.argmax()})"
        note += f", idlest {end.min():.2f} (expert {end.argmin()})"
        note += "" if dropped is None else f", {100 * dropped:.2f}\N{NO-BREAK SPACE}% dropped"
        charts.append(load_chart(layer, steps, shares, note=note, most=most))
    note = (
        "Each expert's share of the tokens, as a multiple of the even share. One row is one "
        "expert; the bars are the mean of the last tenth of the run."
    )
    title = "Load of the experts" + (f": {run.name}" if several else "")
    return html.section(title, note, colour_bar(), html.grid(charts)) if charts else ""


def _origin(runs: Sequence[Run]) -> str:
    names = {
        "started": "Started", "machine": "Machine", "threads": "Threads", "torch": "torch",
        "version": "switchworks", "text": "Text", "train_tokens": "Tokens in the store",
        "vocabulary": "Vocabulary",
    }  # fmt: skip
    rows = []
    for key, title in names.items():
        values = [run.about.get(key, "-") for run in runs]
        texts = [f"{value:,}" if isinstance(value, int) else str(value) for value in values]
        if any(key in run.about for run in runs):
            rows.append([title, *map(escape, texts)])
    commands = [str(run.about["command"]) for run in runs if run.about.get("command")]
    origin = f"<pre>{escape(chr(10).join(commands))}</pre>" if commands else ""
    origins = html.table(_head(runs), rows) if rows else ""
    return html.section("To repeat it", "", origin, html.scroll(origins))


def _settings(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    if not names:
        return ""
    rows = [[name, *(str(run.settings.get(name, "-")) for run in runs)] for name in names]
    differing = [number for number, row in enumerate(rows) if len(set(row[1:])) > 1]
    table = html.table(_head(runs), [list(map(escape, row)) for row in rows], marked=differing)
    summary = "All settings" + ("; those that differ are marked" if len(runs) > 1 else "")
    return f"<section>{html.details(summary, html.scroll(table))}</section>"
