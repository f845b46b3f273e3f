"""The key figures of runs, as text for tiles and tables."""

from collections.abc import Sequence

from switchworks.evaluate import measure_perplexity
from switchworks.report.charts import short
from switchworks.report.html import Tile
from switchworks.report.runs import Reached, Run, when_reached

_NOT_REACHED = "not reached"
LOSSES = ("Validation loss", "Validation perplexity", "Training loss")
"""The key figures that depend on text, tokenizer and task."""


def figures(run: Run) -> list[Tile]:
    """The key figures of a run, losses first, and last where it has classes; those without a value
    are left out."""
    losses, others = _losses(run), [*_size(run), *_routing(run)]
    return [tile for tile in (others + losses if run.classes else losses + others) if tile[1]]


def compact(count: int | float | None) -> str:
    """A count with three digits and its magnitude: 40.9 M, 5.23 B; "" for None."""
    if count is None:
        return ""
    for power, letter in ((12, "T"), (9, "B"), (6, "M")):
        if abs(count) >= 0.9995 * 10**power:
            return f"{count / 10**power:#.3g}".rstrip(".") + f" {letter}"
    return f"{count:,.0f}"


def duration(seconds: int | float | None) -> str:
    """Seconds in the two largest units: 48 s, 5 min 52 s, 3 h 12 min; "" for None."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    while len(parts) > 1 and not parts[0][0]:
        parts.pop(0)
    return " ".join(f"{value} {unit}" for value, unit in parts[:2])


def speedups(runs: Sequence[Run], base: Run, target: float) -> tuple[list[Tile], list[list[str]]]:
    """Tiles, and table rows with their name first: steps (or seconds) of `base` to `target`, its
    final loss, over those of each run."""
    first = when_reached(base, target)
    assert first is not None
    tiles, columns = [], []
    for run in runs:
        columns.append(_speedup(first, when_reached(run, target)))
        steps, ratio, time, time_ratio = columns[-1]
        if run is not base and steps != _NOT_REACHED:
            note, time_note = f"{first.step:,.0f} steps", duration(first.seconds)
            tiles += [
                (f"Speed-up in steps, {run.name}", ratio, f"{steps} instead of {note}"),
                (f"Speed-up in time, {run.name}", time_ratio, f"{time} instead of {time_note}"),
            ]
    goal = f"to a loss of {target:.3f}"
    names = (f"Steps {goal}", "Speed-up in steps", f"Time {goal}", "Speed-up in time")
    return tiles, [[name, *cells] for name, *cells in zip(names, *columns, strict=True)]


def _speedup(base: Reached, run: Reached | None) -> list[str]:
    if run is None:
        return [_NOT_REACHED] * 4
    steps, time = f"{run.step:,.0f}", duration(run.seconds) or "-"
    return [steps, _ratio(base.step, run.step), time, _ratio(base.seconds, run.seconds)]


def _ratio(base: float | None, run: float | None) -> str:
    return f"{base / run:.2f}x" if base and run else "-"


def by_corpus(runs: Sequence[Run]) -> dict[str, list[tuple[str, str] | None]]:
    """Corpus -> for each run its last validation loss on it, and its share and epochs as a note;
    None for a run that was not validated on it."""
    keys = dict.fromkeys(key for run in runs for key in run.keys("val/loss/"))
    names = [key.removeprefix("val/loss/") for key in keys]
    return {name: [_corpus(run, name) for run in runs] for name in names}


def _corpus(run: Run, name: str) -> tuple[str, str] | None:
    loss, epochs = run.last(f"val/loss/{name}"), run.last(f"epoch/{name}")
    if loss is None:
        return None
    corpora = run.about.get("corpora")
    rate = corpora.get(name, {}).get("rate") if isinstance(corpora, dict) else None
    notes = [
        f"{rate:.2%} of the rows" if isinstance(rate, float) else "",
        "" if epochs is None else f"read {epochs:.3g} times",
    ]
    return f"{loss:.3f}", ", ".join(note for note in notes if note)


def recorded(run: Run, name: str) -> int | float | None:
    """A number of about.json; None if it is missing or no number."""
    value = run.about.get(name)
    return value if isinstance(value, int | float) else None


def _losses(run: Run) -> list[Tile]:
    steps, losses = run.series("val/loss")
    loss, training = run.last("val/loss"), run.settled("train/loss")
    best = ""
    if len(losses) and losses.min() < losses[-1]:
        best = f"best {losses.min():.3f} at step {int(steps[losses.argmin()]):,}"
    perplexity = "" if loss is None else short(measure_perplexity(loss))
    texts = ["" if value is None else f"{value:.3f}" for value in (loss, training)]
    values = (texts[0], perplexity, texts[1])
    notes = (
        best or "nats per target token",
        "exp of the loss, per target token",
        "mean of the last tenth",
    )
    return list(zip(LOSSES, values, notes, strict=True))


def _size(run: Run) -> list[Tile]:
    active = recorded(run, "active_parameters")
    active_note = "" if active is None else f"{compact(active)} used per token"
    return [
        ("Steps", compact(run.rows[-1]["step"]) if run.rows else "", ""),
        ("Tokens", compact(run.last("tokens")), "seen in training"),
        ("Training time", duration(run.last("seconds")), ""),
        ("Tokens per second", compact(run.median("tokens_per_second")), "median"),
        ("Parameters", compact(recorded(run, "parameters")), active_note),
        ("FLOPs per token", compact(recorded(run, "flops_per_token")), ""),
    ]


def _routing(run: Run) -> list[Tile]:
    if not run.sparse:
        return []
    dropped, used = run.settled("train/dropped"), run.settled("train/experts_in_use")
    loads = run.loads()
    experts = max((shares.shape[1] for _, shares in loads.values()), default=0)
    layers = f", mean of {len(loads)} layers" if len(loads) > 1 else ""
    total = f" of {experts}" if experts else ""
    dropped_note = "had no room at their expert; mean of the last tenth"
    return [
        ("Dropped tokens", "" if dropped is None else f"{100 * dropped:.2f} %", dropped_note),
        ("Experts in use", "" if used is None else f"{used:.1f}{total}", f"per layer{layers}"),
    ]
