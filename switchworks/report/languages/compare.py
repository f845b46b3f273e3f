"""A switch model and its dense twin language by language: figures 7 and 8, and who is routed where.

One pair of runs, or several with other seeds, whose losses are then averaged step by step.
`write_languages` puts pictures and tables into a folder. Steps come from the runs' metrics, last
qualities from their models on more held-out text, routing from the first switch model.
"""

import csv
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import reduce
from pathlib import Path
from statistics import fmean

import numpy as np
from jaxtyping import Float

from switchworks.config import DataError
from switchworks.data import english_name, script_name, script_of
from switchworks.evaluate import LanguageRouting, evaluate_run, open_run, routing_by_language
from switchworks.report.languages.charts import (
    draw_heat,
    draw_quality,
    draw_similarity,
    draw_speedups,
)
from switchworks.report.runs import Run, crossing, read_run

LOSS, BITS = "val/loss/", "val/bits_per_byte/"
ROWS = 64
"""Of a batch that last qualities are measured on."""
ROUTED = 4
"""Batches of each language that routing is counted on: with fewer tokens chance alone would part
languages that are routed alike."""
THRESHOLDS = (1.0, 2.0, 4.0)
"""Of the step speed-up; the paper has 91 % of its languages at 4 or more."""

Curve = tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]
"""Steps, and a loss at each."""


@dataclass(frozen=True, kw_only=True)
class OfLanguage:
    """How the switch model and its dense twin did on one language; of a quality more is better."""

    code: str
    language: str
    script: str
    rate: float
    """Share of the rows to train on."""
    epochs: float
    """How often its text was read."""
    dense_quality: float
    """Negative log perplexity: minus the last held-out loss, in nats per target token."""
    switch_quality: float
    improvement: float
    dense_bits_per_byte: float
    switch_bits_per_byte: float
    dense_steps: float
    """Steps of the dense twin."""
    dense_first: float
    """Steps after which it first was as good as at its end: fewer where it overfitted."""
    switch_steps: float
    """Steps in which the switch model came to that quality; not a number if it never did."""
    step_speedup: float
    """dense_steps over switch_steps; not a number if it never did."""


def compare(runs: Sequence[Run]) -> list[OfLanguage]:
    """Every language that all of `runs`, switch models and dense twins, were validated on.

    Raises DataError if a side is missing, if the runs differ in their text, batch or steps, or if
    there is no such language.
    """
    sparse = [run for run in runs if run.sparse]
    dense = [run for run in runs if not run.sparse]
    if not sparse or not dense:
        raise DataError(
            f"Of {len(runs)} runs {len(sparse)} have switch layers; figures by language need runs "
            "with and without.\n  Name a switch model's run and its dense twin's."
        )
    _require_alike(runs)
    found = [_of(code, sparse, dense) for code in _languages(runs)]
    if not found:
        raise DataError(
            "The runs were not validated on any language in common.\n"
            "  Train both on the same mixture, with validate_every above 0."
        )
    return found


def _require_alike(runs: Sequence[Run]) -> None:
    """What a comparison of losses, bits and steps wants the same on both sides."""
    for run in runs[1:]:
        apart = [
            f"{name} {runs[0].settings.get(name)} and {run.settings.get(name)}"
            for name in dict.fromkeys([*runs[0].settings, *run.settings])
            if _counts(name) and runs[0].settings.get(name) != run.settings.get(name)
        ]
        ends = [one.rows[-1]["step"] if one.rows else 0 for one in (runs[0], run)]
        for name, about in (("text and tokenizer", "text_digest"), ("tokens", "train_tokens")):
            read = [one.about.get(about) for one in (runs[0], run)]
            if None not in read and read[0] != read[1]:
                apart.append(f"{name} {read[0]} and {read[1]}")
        if ends[0] != ends[1]:
            apart.append(f"last step {ends[0]} and {ends[1]}")
        if apart:
            raise DataError(
                f"{runs[0].path} and {run.path} cannot be compared: {'; '.join(apart)}.\n"
                "  Languages are compared between runs of one text, batch and length."
            )


def _counts(setting: str) -> bool:
    """Whether runs that differ in it have other rows, other losses or other steps."""
    same_rows = ("data.cache", "data.workers", "data.prefetch")
    return setting in ("steps", "batch_size", "precision", "validation_batches") or (
        setting.startswith("data.") and setting not in same_rows
    )


def summary(found: Sequence[OfLanguage]) -> str:
    """Shares and means in a few lines."""
    speedups = [one.step_speedup for one in found if math.isfinite(one.step_speedup)]
    better = sum(one.improvement > 0 for one in found)
    lines = [
        f"{len(found)} languages",
        f"improved          {better} ({better / len(found):.0%}), by "
        f"{fmean(one.improvement for one in found):.4f} nats per target token on average",
    ]
    if speedups:
        lines.append(
            f"step speed-up     mean {fmean(speedups):.2f}, median {np.median(speedups):.2f}, over "
            f"the {len(speedups)} that came to the dense twin's final quality"
        )
    lines += [
        f"at or above {bound:.0f}x   {share_at(found, bound):.0%} of all" for bound in THRESHOLDS
    ]
    return "\n".join(lines)


def share_at(found: Sequence[OfLanguage], bound: float) -> float:
    """The share of the languages with a step speed-up of `bound` or more."""
    return sum(one.step_speedup >= bound for one in found) / len(found)


def measured(found: Sequence[OfLanguage], runs: Sequence[Run], *, batches: int) -> list[OfLanguage]:
    """`found` with last qualities of the models in `runs` on `batches` batches of 64 rows each.

    Of a language with less held-out text all whole batches are read. While a run trains it reads
    `validation_batches`, which for a hundred languages is little of each; a difference of some
    hundredths of a nat wants more. Raises CheckpointError if a model cannot be opened, DataError
    if the text of a language is gone.
    """
    sides: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for run in runs:
        logging.getLogger(__name__).info("measuring %s", run.path)
        each = evaluate_run(run.path, batches=batches * len(found), batch_size=ROWS)
        if lost := [one.code for one in found if f"loss/{one.code}" not in each]:
            raise DataError(
                f"There is no text of {', '.join(lost)} here, on which {run.path} was validated.\n"
                "  Install or restore what the run read, or take its last validation: --batches 0."
            )
        sides[run.sparse].append(each)
    return [_with_last(one, sides[True], sides[False]) for one in found]


def _with_last(
    one: OfLanguage, sparse: Sequence[dict[str, float]], dense: Sequence[dict[str, float]]
) -> OfLanguage:
    def mean(side: Sequence[dict[str, float]], name: str) -> float:
        return fmean(each[f"{name}/{one.code}"] for each in side)

    return replace(
        one,
        dense_quality=-mean(dense, "loss"),
        switch_quality=-mean(sparse, "loss"),
        improvement=mean(dense, "loss") - mean(sparse, "loss"),
        dense_bits_per_byte=mean(dense, "bits_per_byte"),
        switch_bits_per_byte=mean(sparse, "bits_per_byte"),
    )


def write_languages(run_dirs: Sequence[Path], out: Path, *, batches: int = 16) -> str:
    """Pictures and tables about the runs in `run_dirs` are in the folder `out`; the summary.

    Last qualities are measured as in `measured`, or are those of the last validation if `batches`
    is 0. Raises DataError as `compare` does, CheckpointError if a model cannot be opened.
    """
    runs = [read_run(Path(path)) for path in run_dirs]
    found = compare(runs)
    if batches:
        found = measured(found, runs, batches=batches)
    out.mkdir(parents=True, exist_ok=True)
    write_table(out / "languages.csv", found)
    names = [one.code for one in found]
    dense, switch = (
        [getattr(one, f"{side}_quality") for one in found] for side in ("dense", "switch")
    )
    draw_quality(out / "quality.png", names, dense, switch)
    draw_speedups(out / "speedups.png", [one.step_speedup for one in found])
    model, corpora = open_run(next(run for run in runs if run.sparse).path)
    held_out = corpora.held_out(batch_size=ROWS, batches=ROUTED * len(found))
    write_routing(out, routing_by_language(model, held_out.batches))
    return summary(found)


def write_table(path: Path, found: Iterable[OfLanguage]) -> None:
    """`path` is a CSV with a language a line."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(OfLanguage)])
        for one in found:
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in astuple(one)])


def write_routing(out: Path, routing: LanguageRouting) -> None:
    """Experts by language and by script as heat maps, languages alike as a map, and one table."""
    with (out / "routing.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["code", "script", "layer", "expert", "share"])
        for code, of_layers in zip(routing.languages, routing.shares, strict=True):
            for layer, shares in zip(routing.layers, of_layers, strict=True):
                for expert, share in enumerate(shares):
                    writer.writerow([code, script_of(code), layer, expert, f"{share:.6f}"])
    order = routing.order()
    rows = [_label(routing.languages[index]) for index in order]
    scripts = [script_of(routing.languages[index]) for index in order]
    draw_heat(out / "routing.png", rows, scripts, routing.layers, routing.shares[order])
    own = sorted(set(scripts))
    means = [
        np.mean(
            [
                s
                for c, s in zip(routing.languages, routing.shares, strict=True)
                if script_of(c) == one
            ],
            axis=0,
        )
        for one in own
    ]
    draw_heat(
        out / "scripts.png", [script_name(s) for s in own], own, routing.layers, np.stack(means)
    )
    if len(rows) > 1:
        similar = 1 - routing.distances()[np.ix_(order, order)]
        draw_similarity(out / "similarity.png", rows, scripts, similar, routing.tree())


def _label(code: str) -> str:
    return f"{english_name(code)}  {code}"


def _languages(runs: Sequence[Run]) -> list[str]:
    """In the order of the first run's metrics."""
    noted = [
        dict.fromkeys(k.removeprefix(LOSS) for row in run.rows for k in row if k.startswith(LOSS))
        for run in runs
    ]
    return [name for name in noted[0] if all(name in others for others in noted)]


def _of(code: str, sparse: Sequence[Run], dense: Sequence[Run]) -> OfLanguage:
    ours, theirs = (
        _mean_curve([run.series(LOSS + code) for run in side]) for side in (sparse, dense)
    )
    target = float(theirs[1][-1])
    steps = [crossing(*curve, target) for curve in (theirs, ours)]
    dense_first, switch_steps = (math.nan if step is None else step for step in steps)
    dense_steps = float(theirs[0][-1])
    bits = [_mean_last([run.last(BITS + code) for run in side]) for side in (dense, sparse)]
    about = sparse[0].about.get("corpora")
    return OfLanguage(
        code=code,
        language=english_name(code),
        script=script_of(code),
        rate=float(about.get(code, {}).get("rate", math.nan))
        if isinstance(about, dict)
        else math.nan,
        epochs=_mean_last([run.last(f"epoch/{code}") for run in sparse]),
        dense_quality=-target,
        switch_quality=-float(ours[1][-1]),
        improvement=target - float(ours[1][-1]),
        dense_bits_per_byte=bits[0],
        switch_bits_per_byte=bits[1],
        dense_steps=dense_steps,
        dense_first=dense_first,
        switch_steps=switch_steps,
        step_speedup=dense_steps / switch_steps,
    )


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of the losses at the steps that all curves have."""
    steps = reduce(np.intersect1d, [steps for steps, _ in curves])
    if not len(steps):
        raise DataError("The runs have no validation at the same step. Use one validate_every.")
    return steps, np.mean([y[np.isin(x, steps)] for x, y in curves], axis=0)


def _mean_last(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return fmean(known) if known else math.nan
