"""What runs over tasks came to: metrics as curves and a table, and which step was the best."""

from collections.abc import Sequence
from dataclasses import replace

from switchworks.report.charts import Curve, curves_of, line_chart
from switchworks.report.runs import Run

Cell = tuple[str, str]
"""A value, and a note on it."""


def task_names(runs: Sequence[Run]) -> list[str]:
    """The tasks that any of the runs was measured on, in the order of their first measurement."""
    first, last = "task/", "/score"
    return [
        key.removeprefix(first).removesuffix(last)
        for key in _keys(runs, first)
        if key.endswith(last)
    ]


def task_charts(runs: Sequence[Run]) -> list[str]:
    """A chart for each task: of one run all its metrics, of several their scores."""
    charts = [_chart(name, "out of 100", _curves(runs, name), runs) for name in task_names(runs)]
    if len(charts) > 1:
        mean = curves_of(runs, "task/mean", kind="points")
        charts.insert(0, _chart("All tasks", "mean score", mean, runs))
    return charts


def _chart(title: str, unit: str, curves: Sequence[Curve], runs: Sequence[Run]) -> str:
    """From zero: scores rise, and the height they start from matters."""
    return line_chart(title, unit, "step", curves, from_zero=True, mark=best_mark(runs))


def best_mark(runs: Sequence[Run]) -> tuple[float, str] | None:
    """The step of the best weights and a name for it; None for several runs."""
    step = _best_step(runs[0]) if len(runs) == 1 else None
    return None if step is None else (step, f"best: step {step:,.0f}")


def task_rows(runs: Sequence[Run]) -> list[list[Cell]]:
    """Rows of a table, name first: every metric of every task, in every run.

    A value is that of the step whose weights became the model; the note has that of the last step.
    """
    rows = []
    for name in task_names(runs):
        metrics = _metrics(runs, name)
        several = len(metrics) > 1
        for metric in metrics if several else ["score"]:
            title = f"{name}, {metric}" if several else name
            rows.append([(title, ""), *(_at_best(run, f"task/{name}/{metric}") for run in runs)])
    for key in _averages(runs):
        rows.append([(key.removeprefix("task/"), ""), *(_at_best(run, key) for run in runs)])
    return rows


def best_sentence(run: Run) -> str:
    """Which step's weights became the model, as a sentence; "" if the last one's did."""
    step, metric, value = (run.best.get(key) for key in ("step", "metric", "value"))
    if not isinstance(step, int):
        return ""
    number = f"{value:.4g}" if isinstance(value, float | int) else str(value)
    early = (
        " It was no better after that, and the run ended." if run.best.get("ended_early") else ""
    )
    return f"The model is that of step {step:,}, the best by {metric} ({number}).{early}"


def _curves(runs: Sequence[Run], name: str) -> list[Curve]:
    if len(runs) > 1:
        return curves_of(runs, f"task/{name}/score", kind="points")
    return [
        replace(curve, label=metric, colour=colour)
        for colour, metric in enumerate(_metrics(runs, name))
        for curve in curves_of(runs, f"task/{name}/{metric}", kind="points")
    ]


def _keys(runs: Sequence[Run], prefix: str) -> list[str]:
    """The keys of the runs' metrics that start with `prefix`, in the order they first occur in."""
    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    return [key for key in keys if key.startswith(prefix)]


def _metrics(runs: Sequence[Run], name: str) -> list[str]:
    """The metrics of a task without its score, which is one of them or their mean."""
    prefix = f"task/{name}/"
    metrics = [key.removeprefix(prefix) for key in _keys(runs, prefix)]
    return [metric for metric in metrics if metric != "score"]


def _averages(runs: Sequence[Run]) -> list[str]:
    """task/mean of several tasks, and the benchmarks that are complete."""
    keys = [key for key in _keys(runs, "task/") if key.count("/") == 1]
    return keys if len(task_names(runs)) > 1 else []


def _best_step(run: Run) -> float | None:
    step = run.best.get("step")
    return float(step) if isinstance(step, int) else run.last("best/step")


def _at_best(run: Run, key: str) -> Cell:
    """The value at the best step; the last value if there is no best step."""
    steps, values = run.series(key)
    if not len(values):
        return "-", ""
    last, best = values[-1], _best_step(run)
    at = [value for step, value in zip(steps, values, strict=True) if step == best]
    if not at or best == steps[-1]:
        return f"{last:.2f}", f"step {steps[-1]:,.0f}"
    return f"{at[0]:.2f}", f"step {best:,.0f}, the best; {last:.2f} after the last"
