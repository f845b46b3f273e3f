"""The HTML page about one run or several: its sections, and in which order they stand."""

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np

from switchworks.config import DataError
from switchworks.disk import well_formed, write_text
from switchworks.report import html
from switchworks.report.charts import Chart, Curve, Kind, Mark, curves_of, line_chart, points_of
from switchworks.report.classes import classes_section
from switchworks.report.figures import LOSSES, by_corpus, compact, figures, recorded, speedups
from switchworks.report.load_chart import LoadMap, colour_bar, load_chart
from switchworks.report.runs import Run, baseline, comparable, difference, last_part, read_run
from switchworks.report.samples import samples_section
from switchworks.report.svg import COLOURS
from switchworks.report.tasks import best_mark, task_charts, tasks_section

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
    runs, several = with_distinct_names(runs), len(runs) > 1
    facts = [fact for fact in _facts(runs[0]) if all(fact in _facts(run) for run in runs)]
    names = ", ".join(run.name for run in runs)
    sections = [html.header(names, facts), *(_problems(run) for run in runs)]
    for run in runs:
        sections += [classes_section(each, run.name if several else "") for each in run.classes]
    if several:
        sections.append(_comparison(runs))
    elif runs[0].rows:
        title = "The run" if runs[0].classes else ""  # else the tiles are the top of the page
        tiles = html.tiles(figures(runs[0]))
        sections.append(html.section(title, "", tiles) if title else tiles)
    sections += [_learning(runs), tasks_section(runs), *map(_corpora, comparable(runs))]
    sections += [_speed(runs), _routing(runs)]
    sections += [_loads(run, several=several) for run in runs]
    sections += [samples_section(run, several=several) for run in runs]
    sections += [_origin(runs), _settings(runs)]
    return html.document(f"{names} - switchworks report", sections)


def page_charts(runs: Sequence[Run]) -> list[tuple[Run | None, Chart | LoadMap]]:
    """Every curve and map of the page, in its order, with the run if it is of one of several."""
    charts: list[Chart | LoadMap] = [*_learning_charts(runs), *task_charts(runs)]
    for group in comparable(runs):
        charts += _corpora_charts(group)
    charts += [*_speed_charts(runs), *_routing_charts(runs)]
    maps = [(run if len(runs) > 1 else None, load) for run in runs for load in _load_maps(run)]
    return [*((None, chart) for chart in charts), *maps]


def with_distinct_names(runs: Sequence[Run]) -> list[Run]:
    """Runs in directories of one name get the folder above, or else the whole path, as their
    name."""
    for longer in (lambda path: f"{path.parent.name}/{path.name}", str):
        names = [run.name for run in runs]
        runs = [
            replace(run, name=longer(run.path.resolve())) if names.count(run.name) > 1 else run
            for run in runs
        ]
    return list(runs)


def _facts(run: Run) -> list[str]:
    tokens, vocabulary = recorded(run, "train_tokens"), recorded(run, "vocabulary")
    recipe = str(run.settings.get("name") or run.name)
    facts = [
        f"recipe {recipe}" if recipe != run.path.resolve().name else "",
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
    """Key figures side by side, and speed-ups; losses only if all can be compared."""
    groups = comparable(runs)
    columns = [{name: (value, note) for name, value, note in figures(run)} for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [
        html.row(name, [column.get(name) for column in columns])
        for name in names
        if len(groups) == 1 or name not in LOSSES
    ]
    by_run = html.card(html.table(_head(runs), rows))
    speedups = "".join(map(_speedups, groups))
    return html.section("Comparison", "", _not_compared(groups), speedups, by_run)


def _not_compared(groups: Sequence[Sequence[Run]]) -> str:
    """A notice which runs are not compared by loss, and why; "" if all are."""
    if len(groups) == 1:
        return ""
    base = groups[0][0]
    lines = [
        f"Not compared with {base.name} by loss, and without a speed-up over it: "
        f"{', '.join(run.name for run in group)}, which read {difference(group[0], base)}."
        for group in groups[1:]
    ]
    return html.notice(*lines, "A loss is per token of its text, tokenizer and task.")


def _speedups(runs: Sequence[Run]) -> str:
    """Tiles and a table of how much sooner each run came to the loss of the baseline."""
    base = baseline(runs)
    target = base.last("val/loss")
    if target is None or len(runs) == 1:
        return ""
    tiles, rows = speedups(runs, base, target)
    definition = html.soft(
        "Speed-up, as in the Switch Transformer paper: the steps (or the seconds of training) "
        f"{escape(base.name)} took to its final validation loss of {target:.3f}, divided by "
        "those another run took to come down to the same loss. Between two validations the "
        "loss is taken to fall in a straight line."
    )
    table = html.table(_head(runs), [list(map(escape, row)) for row in rows])
    return html.tiles(tiles) + definition + html.card(table)


def _head(runs: Sequence[Run]) -> list[str]:
    return ["", *(run.name for run in runs)]


def _losses(
    runs: Sequence[Run], group: Sequence[Run], against: str, unit: float = 1
) -> list[Curve]:
    """The losses of a group of `runs`, in their colours on the whole page."""
    curves: list[Curve] = []
    single = len(runs) == 1
    noisy: Kind = "noisy" if single else "smooth"
    lines: list[tuple[str, str, Kind]] = [("training", "train/loss", noisy)]
    lines.append(("validation", "val/loss", "points"))
    for place, run in enumerate(runs):
        for name, key, kind in lines if run in group else ():
            x, y = run.series(key, against)
            label = name if single else f"{run.name}, {name}"
            colour = len(curves) if single else place  # one for each curve, or for each run
            curves.append(Curve(x=x / unit, y=y, label=label, colour=colour, kind=kind))
    return curves


def _learning(runs: Sequence[Run]) -> str:
    note = "Lower is better. Training loss is smoothed"
    note += ", with its raw values behind." if len(runs) == 1 else "."
    return html.section("How it learned", note, _grid(_learning_charts(runs)))


def _learning_charts(runs: Sequence[Run]) -> list[Chart]:
    """Losses, of runs that cannot be compared apart, and the learning rate."""
    groups = comparable(runs)
    charts = []
    for group in groups:
        charts += _loss_charts(runs, group, apart=len(groups) > 1)
    rate = curves_of(runs, "train/lr", kind="plain")
    return [*charts, Chart("Learning rate", "", "step", rate, from_zero=True)]


def _loss_charts(runs: Sequence[Run], group: Sequence[Run], *, apart: bool) -> list[Chart]:
    longest = max(run.last("seconds") or 0.0 for run in group)
    most = max(run.last("tokens") or 0.0 for run in group)
    seconds, clock = next(
        pair
        for pair in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
        if longest >= 3 * pair[0] or pair[0] == 1
    )
    tokens, magnitude = (1e9, "billion") if most >= 2e9 else (1e6, "million")
    axes = {
        "step": ("step", 1, "step"),
        "time": ("seconds", seconds, f"training time, {clock}"),
        "tokens": ("tokens", tokens, f"tokens seen, {magnitude}"),
    }
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    names = f": {group[0].name}{more}" if apart else ""
    return [
        Chart(
            f"Loss by {name}{names}", LOSS_UNIT, label, _losses(runs, group, against, unit),
            mark=best_mark(runs) if name == "step" else None,
        )
        for name, (against, unit, label) in axes.items()
    ]  # fmt: skip


def _grid(charts: Sequence[Chart]) -> str:
    return html.grid(list(map(line_chart, charts)))


def _corpora(runs: Sequence[Run]) -> str:
    """The loss on each corpus of a mixture; curves for one run, if there are colours enough."""
    losses = by_corpus(runs)
    if not losses:
        return ""
    note = (
        "The last validation loss on each. The validation loss of the run is their mean, each "
        "weighted by its share of the rows."
    )
    rows = [html.row(name, values) for name, values in losses.items()]
    by_run = html.card(html.table(_head(runs), rows))
    return html.section("The corpora", note, _grid(_corpora_charts(runs)), by_run)


def _corpora_charts(runs: Sequence[Run]) -> list[Chart]:
    names = by_corpus(runs)
    if len(runs) > 1 or not 1 <= len(names) <= COLOURS:
        return []
    curves = points_of(runs[0], {name: f"val/loss/{name}" for name in names})
    return [Chart("Validation loss by corpus", LOSS_UNIT, "step", curves)]


def _chart(
    runs: Sequence[Run], name: str, unit: str, key: str, *, scale: int = 1, line: Mark | None = None
) -> Chart:
    curves = curves_of(runs, key, scale=scale)
    return Chart(name, unit, "step", curves, from_zero=True, reference=line)


def _speed(runs: Sequence[Run]) -> str:
    note = "Speed, and the size of the gradients."
    return html.section("How it ran", note, _grid(_speed_charts(runs)))


def _speed_charts(runs: Sequence[Run]) -> list[Chart]:
    return [
        _chart(runs, "Throughput", "tokens per second", "tokens_per_second"),
        _chart(runs, "Gradient norm", "over all parameters", "train/grad_norm"),
    ]


def _routing(runs: Sequence[Run]) -> str:
    note = (
        "Every switch layer sends each token to one expert. A token that finds its expert full is "
        "dropped: it passes the layer unchanged."
    )
    return html.section("How it routed", note, _grid(_routing_charts(runs)))


def _routing_charts(runs: Sequence[Run]) -> list[Chart]:
    if not any(run.sparse for run in runs):
        return []
    experts = max((loads.shape[1] for run in runs for _, loads in run.loads().values()), default=0)
    even, used = (1.0, "even"), (float(experts), f"all {experts}") if experts else None
    balance, busiest = curves_of(runs, "train/balance"), _busiest(runs)
    by_balance, by_load = (
        "1 = even, E = all tokens to one expert",
        "times the even share, of all layers",
    )
    return [
        Chart("Balance", by_balance, "step", balance, reference=even),
        _chart(runs, "Dropped tokens", "% of tokens", "train/dropped", scale=100),
        Chart("Busiest expert", by_load, "step", busiest, from_zero=True, reference=even),
        _chart(runs, "Experts in use", "mean over layers", "train/experts_in_use", line=used),
        _chart(runs, "Confidence", "probability of the chosen expert", "train/confidence"),
        _chart(runs, "Router z", "squared log-sum-exp of its logits", "train/router_z"),
    ]


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
    """A heat map and final bars for each switch layer."""
    note = (
        "Each expert's share of the tokens, as a multiple of the even share. One row is one "
        "expert; the bars are the mean of the last tenth of the run."
    )
    title, maps = "Load of the experts" + (f": {run.name}" if several else ""), _load_maps(run)
    charts = html.grid(list(map(load_chart, maps)))
    return html.section(title, note, colour_bar(), charts) if maps else ""


def _load_maps(run: Run) -> list[LoadMap]:
    """The maps of the switch layers, the bars to one scale."""
    loads = run.loads()
    ends = {layer: last_part(shares).mean(axis=0) for layer, (_, shares) in loads.items()}
    most = max([2.0, *(1.05 * float(end.max()) for end in ends.values())])
    maps = []
    for layer, (steps, shares) in loads.items():
        end, dropped = ends[layer], run.settled(f"dropped/{layer}")
        note = f"busiest {end.max():.2f} (expert {end.argmax()})"
        note += f", idlest {end.min():.2f} (expert {end.argmin()})"
        note += "" if dropped is None else f", {100 * dropped:.2f}\N{NO-BREAK SPACE}% dropped"
        maps.append(LoadMap(title=layer, note=note, steps=steps, loads=shares, most=most))
    return maps


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
