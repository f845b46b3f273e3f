"""What runs over tasks came to: metrics as curves and a table, and which step was the best."""

from collections.abc import Sequence

from switchworks.report.charts import COLOURS, Curve, line_chart
from switchworks.report.runs import Run

Cell = tuple[str, str]
"""A value, and what is to be known about it."""


def task_names(runs: Sequence[Run]) -> list[str]:
    """The tasks that any of the runs was measured on, in the order of their first measurement."""
    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    ends = ("task/", "/score")
    return [
        key.removeprefix(ends[0]).removesuffix(ends[1])
        for key in keys
        if key.startswith(ends[0]) and key.endswith(ends[1])
    ]


def task_charts(runs: Sequence[Run]) -> list[str]:
    """A chart for each task: of one run all its metrics, of several their scores."""
    charts = [
        line_chart(
            name,
            "out of 100",
            "step",
            _curves(runs, name),
            from_zero=True,  # scores rise, and where they come from is worth seeing
            mark=best_mark(runs),
        )
        for name in task_names(runs)
    ]
    if len(charts) > 1:
        charts.insert(0, _mean(runs))
    return charts


def best_mark(runs: Sequence[Run]) -> tuple[float, str] | None:
    """Where on the axis of steps the best weights of a run are; of several runs there is none."""
    step = _best_step(runs[0]) if len(runs) == 1 else None
    return None if step is None else (step, f"best: step {step:,.0f}")


def task_rows(runs: Sequence[Run]) -> list[list[Cell]]:
    """Rows of a table, each with its name first: every metric of every task, in every run.

    It is that of the step whose weights became the model; the note says what the last one had.
    """
    rows = []
    for name in task_names(runs):
        figures = _figures(runs, name)
        shown = figures if len(figures) > 1 else ["score"]
        for figure in shown:
            title = f"{name}, {figure}" if len(figures) > 1 else name
            rows.append([(title, ""), *(_at_best(run, f"task/{name}/{figure}") for run in runs)])
    for key in _averages(runs):
        rows.append([(key.removeprefix("task/"), ""), *(_at_best(run, key) for run in runs)])
    return rows


def said_of_best(run: Run) -> str:
    """Which step's weights became the model, as a sentence; "" if the last one's did."""
    step, metric, value = (run.best.get(key) for key in ("step", "metric", "value"))
    if not isinstance(step, int):
        return ""
    worth = f"{value:.4g}" if isinstance(value, float | int) else str(value)
    ended = (
        " It was no better after that, and the run ended." if run.best.get("ended_early") else ""
    )
    return f"The model is that of step {step:,}, the best by {metric} ({worth}).{ended}"


def _curves(runs: Sequence[Run], name: str) -> list[Curve]:
    if len(runs) == 1:
        keys = [(figure, colour, runs[0]) for colour, figure in enumerate(_figures(runs, name))]
    else:
        keys = [("score", colour, run) for colour, run in enumerate(runs)]
    curves = []
    for figure, colour, run in keys:
        x, y = run.series(f"task/{name}/{figure}")
        label = figure if len(runs) == 1 else run.name
        curves.append(Curve(x=x, y=y, label=label, colour=colour % COLOURS, kind="points"))
    return curves


def _mean(runs: Sequence[Run]) -> str:
    curves = [
        Curve(x=x, y=y, label=run.name, colour=colour, kind="points")
        for colour, run in enumerate(runs)
        for x, y in [run.series("task/mean")]
    ]
    return line_chart(
        "All tasks", "mean score", "step", curves, from_zero=True, mark=best_mark(runs)
    )


def _figures(runs: Sequence[Run], name: str) -> list[str]:
    """The metrics of a task without its score, which is one of them or their mean."""
    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    prefix = f"task/{name}/"
    found = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
    return [figure for figure in found if figure != "score"]


def _averages(runs: Sequence[Run]) -> list[str]:
    """task/mean of several tasks, and the benchmarks that are complete."""
    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    found = [key for key in keys if key.startswith("task/") and key.count("/") == 1]
    return found if len(task_names(runs)) > 1 else []


def _best_step(run: Run) -> float | None:
    step = run.best.get("step")
    return float(step) if isinstance(step, int) else run.last("best/step")


def _at_best(run: Run, key: str) -> Cell:
    """The value at the best step, or the last if no step is known as that."""
    steps, values = run.series(key)
    if not len(values):
        return "-", ""
    last, best = values[-1], _best_step(run)
    at = [value for step, value in zip(steps, values, strict=True) if step == best]
    if not at or best == steps[-1]:
        return f"{last:.2f}", f"step {steps[-1]:,.0f}"
    return f"{at[0]:.2f}", f"step {best:,.0f}, the best; {last:.2f} after the last"
