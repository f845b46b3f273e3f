"""The key figures of runs, in words and numbers people read: for tiles and comparisons."""

import math
from collections.abc import Sequence

from switchworks.report.runs import Reached, Run, baseline, when_reached

Figure = tuple[str, str, str]
"""A figure worth a tile: its name, its value and, smaller, what is to be known about it."""


def figures(run: Run) -> list[Figure]:
    """The key figures of a run; those it did not note are left out."""
    found = [*_quality(run), *_size(run), *_routing_figures(run)]
    return [figure for figure in found if figure[1]]


def compact(count: int | float | None) -> str:
    """A count with three digits and its magnitude: 40.9 M, 5.23 B; "" for None."""
    if count is None:
        return ""
    for power, letter in ((12, "T"), (9, "B"), (6, "M")):
        if abs(count) >= 0.9995 * 10**power:
            return f"{count / 10**power:#.3g}".rstrip(".") + f" {letter}"
    return f"{count:,.0f}"


def duration(seconds: int | float | None) -> str:
    """Seconds as people say them: 48 s, 5 min 52 s, 3 h 12 min; "" for None."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    while len(parts) > 1 and not parts[0][0]:
        parts.pop(0)
    return " ".join(f"{value} {unit}" for value, unit in parts[:2])


def speedups(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of a table, each with its name first: when each run was as good as the baseline became.

    A speed-up is the baseline's own steps (or seconds) to that loss over the run's. Empty if the
    baseline was never validated.
    """
    base = baseline(runs)
    target = base.last("val/loss")
    if target is None:
        return []
    own = when_reached(base, target)
    columns = [_speedup(own, when_reached(run, target)) for run in runs]
    names = (
        f"Steps to a loss of {target:.3f}",
        "Speed-up in steps",
        f"Time to a loss of {target:.3f}",
        "Speed-up in time",
    )
    return [[name, *cells] for name, *cells in zip(names, *columns, strict=True)]


def gains(runs: Sequence[Run]) -> list[Figure]:
    """Tiles of a comparison: the speed-ups of every run that became as good as the baseline."""
    base = baseline(runs)
    target = base.last("val/loss")
    own = None if target is None else when_reached(base, target)
    found = []
    for run in runs:
        reached = None if run is base or target is None else when_reached(run, target)
        if own is None or reached is None:
            continue
        steps, ratio, time, time_ratio = _speedup(own, reached)
        found += [
            (f"Speed-up in steps, {run.name}", ratio, f"{steps} instead of {own.step:,.0f} steps"),
            (
                f"Speed-up in time, {run.name}",
                time_ratio,
                f"{time} instead of {duration(own.seconds)}",
            ),
        ]
    return found


def _speedup(own: Reached | None, other: Reached | None) -> list[str]:
    if own is None or other is None:
        return ["not reached"] * 4
    return [
        f"{other.step:,.0f}",
        _ratio(own.step, other.step),
        duration(other.seconds) or "-",
        _ratio(own.seconds, other.seconds),
    ]


def by_corpus(runs: Sequence[Run]) -> dict[str, list[tuple[str, str] | None]]:
    """Per corpus of mixtures, in every run: its last validation loss, and what share it had and
    how often it was read; None in a run that was not validated on it."""
    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    names = [key.removeprefix("val/loss/") for key in keys if key.startswith("val/loss/")]
    return {name: [_of_corpus(run, name) for run in runs] for name in names}


def _of_corpus(run: Run, name: str) -> tuple[str, str] | None:
    loss, epochs = run.last(f"val/loss/{name}"), run.last(f"epoch/{name}")
    if loss is None:
        return None
    about = run.about.get("corpora")
    rate = about.get(name, {}).get("rate") if isinstance(about, dict) else None
    notes = [
        f"{rate:.2%} of the rows" if isinstance(rate, float) else "",
        "" if epochs is None else f"read {epochs:.3g} times",
    ]
    return f"{loss:.3f}", ", ".join(note for note in notes if note)


def _ratio(own: float | None, other: float | None) -> str:
    return f"{own / other:.2f}x" if own and other else "-"


def recorded(run: Run, name: str) -> int | float | None:
    """A number of about.json; None if it is missing or no number."""
    value = run.about.get(name)
    return value if isinstance(value, int | float) else None


def _quality(run: Run) -> list[Figure]:
    steps, losses = run.series("val/loss")
    loss = run.last("val/loss")
    best = ""
    if len(losses) and losses.min() < losses[-1]:
        best = f"best {losses.min():.3f} at step {int(steps[losses.argmin()]):,}"
    training = run.settled("train/loss")
    return [
        ("Validation loss", "" if loss is None else f"{loss:.3f}", best or "nats per target token"),
        (
            "Validation perplexity",
            "" if loss is None else _perplexity(loss),
            "exp of the loss, per target token",
        ),
        ("Training loss", "" if training is None else f"{training:.3f}", "mean of the last tenth"),
    ]


def _perplexity(loss: float) -> str:
    value = math.exp(min(loss, 700.0))
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _size(run: Run) -> list[Figure]:
    active = recorded(run, "active_parameters")
    return [
        ("Steps", compact(run.rows[-1]["step"]) if run.rows else "", ""),
        ("Tokens", compact(run.last("tokens")), "seen in training"),
        ("Training time", duration(run.last("seconds")), ""),
        ("Tokens per second", compact(run.median("tokens_per_second")), "median"),
        (
            "Parameters",
            compact(recorded(run, "parameters")),
            "" if active is None else f"{compact(active)} used per token",
        ),
        ("FLOPs per token", compact(recorded(run, "flops_per_token")), ""),
    ]


def _routing_figures(run: Run) -> list[Figure]:
    dropped, used = run.settled("train/dropped"), run.settled("train/experts_in_use")
    if not run.sparse:
        return []
    loads = run.loads()
    experts = max((table.shape[1] for _, table in loads.values()), default=0)
    layers = f", mean of {len(loads)} layers" if len(loads) > 1 else ""
    return [
        (
            "Dropped tokens",
            "" if dropped is None else f"{100 * dropped:.2f} %",
            "had no room at their expert; mean of the last tenth",
        ),
        (
            "Experts in use",
            "" if used is None else f"{used:.1f}" + (f" of {experts}" if experts else ""),
            f"per layer{layers}",
        ),
    ]
