"""What runs over tasks came to: metrics as curves and a table, and which step was the best."""

from collections.abc import Sequence
from html import escape

from switchworks.report import html
from switchworks.report.charts import Chart, Curve, Mark, curves_of, line_chart, points_of
from switchworks.report.runs import Run


def tasks_section(runs: Sequence[Run]) -> str:
    """Every task's metrics as measured while training, and which step was the best."""
    sentences = [
        escape((f"{run.name}: " if len(runs) > 1 else "") + sentence)
        for run in runs
        if (sentence := _best_sentence(run))
    ]
    names = _names(runs)
    if not names:
        return f"<section>{html.soft(' '.join(sentences))}</section>" if sentences else ""
    sentences.insert(0, "Answers to the same validation examples, out of 100; higher is better.")
    head = ["", *(run.name for run in runs)]
    table = html.card(html.table(head, _rows(runs, names)))
    charts = html.grid(list(map(line_chart, task_charts(runs))))
    return html.section("The tasks", " ".join(sentences), charts, table)


def task_charts(runs: Sequence[Run]) -> list[Chart]:
    """The metrics of each task, and first the mean of several."""
    names = _names(runs)
    curves = {name: _curves(runs, name) for name in names}
    if len(names) > 1:
        curves = {"All tasks": curves_of(runs, "task/mean", kind="points")} | curves
    mark = best_mark(runs)
    return [
        Chart(title, "out of 100", "step", lines, from_zero=True, mark=mark)
        for title, lines in curves.items()
    ]


def _names(runs: Sequence[Run]) -> list[str]:
    keys = [key for key in _keys(runs, "task/") if key.endswith("/score")]
    return [key.removesuffix("/score") for key in keys]


def best_mark(runs: Sequence[Run]) -> Mark | None:
    """The step of the best weights and a name for it; None for several runs."""
    step = _best_step(runs[0]) if len(runs) == 1 else None
    return None if step is None else (step, f"best: step {step:,.0f}")


def _keys(runs: Sequence[Run], prefix: str) -> list[str]:
    keys = dict.fromkeys(key for run in runs for key in run.keys(prefix))
    return [key.removeprefix(prefix) for key in keys]


def _metrics(runs: Sequence[Run], name: str) -> list[str]:
    """The metrics of a task without its score, which is one of them or their mean."""
    return [metric for metric in _keys(runs, f"task/{name}/") if metric != "score"]


def _curves(runs: Sequence[Run], name: str) -> list[Curve]:
    if len(runs) > 1:
        return curves_of(runs, f"task/{name}/score", kind="points")
    return points_of(runs[0], {metric: f"task/{name}/{metric}" for metric in _metrics(runs, name)})


def _rows(runs: Sequence[Run], names: Sequence[str]) -> list[list[str]]:
    """Rows of a table, name first: every metric of every task, in every run, at the step whose
    weights became the model, and the means."""
    keys: dict[str, str] = {}
    for name in names:
        metrics = _metrics(runs, name)
        several = {f"{name}, {metric}": f"{name}/{metric}" for metric in metrics}
        keys |= several if len(metrics) > 1 else {name: f"{name}/score"}
    if len(names) > 1:  # task/mean, and the benchmarks that are complete
        keys |= {key: key for key in _keys(runs, "task/") if "/" not in key}
    return [
        [escape(title), *(html.cell(*_at_best(run, f"task/{key}")) for run in runs)]
        for title, key in keys.items()
    ]


def _best_sentence(run: Run) -> str:
    """Which step's weights became the model, as a sentence; "" if the last one's did."""
    step, metric, value = (run.best.get(key) for key in ("step", "metric", "value"))
    if not isinstance(step, int):
        return ""
    number = f"{value:.4g}" if isinstance(value, float | int) else str(value)
    ended = " It was no better after that, and the run ended." * bool(run.best.get("ended_early"))
    return f"The model is that of step {step:,}, the best by {metric} ({number}).{ended}"


def _best_step(run: Run) -> float | None:
    step = run.best.get("step")
    return float(step) if isinstance(step, int) else run.last("best/step")


def _at_best(run: Run, key: str) -> tuple[str, str]:
    """The value at the best step, else the last one, and a note."""
    steps, values = run.series(key)
    if not len(values):
        return "-", ""
    last, best = values[-1], _best_step(run)
    if best not in steps or best == steps[-1]:
        return f"{last:.2f}", f"step {steps[-1]:,.0f}"
    value = values[steps == best][0]
    return f"{value:.2f}", f"step {best:,.0f}, the best; {last:.2f} after the last"
