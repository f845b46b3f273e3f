"""A switch model and its dense twin language by language: two tables, and pictures of them.

Steps come from the runs' metrics, final qualities from their models on more held-out text, routing
from the first switch model.
"""

import csv
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from functools import reduce
from pathlib import Path
from statistics import fmean

import numpy as np
from jaxtyping import Float

from switchworks.config import DataError
from switchworks.data import english_name, script_name, script_of
from switchworks.disk import whole_file
from switchworks.evaluate import LanguageRouting, evaluate_run, open_run, routing_by_language
from switchworks.report import language_charts as charts
from switchworks.report.runs import Run, crossing, read_run

ROWS = 64
ROUTED = 4
"""Batches of each language that routing is counted on: with fewer tokens languages that are routed
alike would differ by chance."""
THRESHOLDS = (1.0, 2.0, 4.0)
"""Of the step speed-up; the paper has 91 % of its languages at 4 or more."""

Curve = tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]


@dataclass(frozen=True, kw_only=True)
class LanguageComparison:
    """A switch model and its dense twin on one language; more is better in a quality."""

    code: str
    language: str
    script: str
    rate: float
    epochs: float
    dense_quality: float
    """Negative log perplexity: minus the held-out loss, in nats per target token."""
    switch_quality: float
    improvement: float
    dense_bits_per_byte: float
    switch_bits_per_byte: float
    dense_steps: float
    dense_first: float
    """Steps to the twin's final quality for the first time: fewer where it overfitted later."""
    switch_steps: float
    """Steps of the switch model to the twin's final quality; nan if it never reached it."""
    step_speedup: float
    """dense_steps over switch_steps; nan if the switch model never reached that quality."""


def write_languages(run_dirs: Sequence[Path], out: Path, *, batches: int = 16) -> str:
    """Write pictures and tables about the runs in `run_dirs` into the folder `out`.

    Returns the summary. Final qualities are measured on `batches` batches of 64 rows of each
    language, of one with less held-out text on all whole batches: while a run trains it reads
    `validation_batches`, which for a hundred languages is too little of each for differences of
    hundredths of a nat. With 0 they are those of the last validation. Raises DataError as `compare`
    does or if the text of a language is gone, CheckpointError if a model cannot be opened.
    """
    runs = [read_run(Path(path)) for path in run_dirs]
    languages = compare(runs, batches=batches)
    out.mkdir(parents=True, exist_ok=True)
    write_table(out / "languages.csv", languages)
    charts.draw_quality(
        out / "quality.png",
        [language.code for language in languages],
        [language.dense_quality for language in languages],
        [language.switch_quality for language in languages],
    )
    charts.draw_speedups(out / "speedups.png", [language.step_speedup for language in languages])
    model, dataset = open_run(next(run for run in runs if run.sparse).path)
    held_out = dataset.held_out(batch_size=ROWS, batches=ROUTED * len(languages))
    write_routing(out, routing_by_language(model, held_out.batches))
    return summary(languages)


def compare(runs: Sequence[Run], *, batches: int = 0) -> list[LanguageComparison]:
    """Every language that all of `runs`, switch models and dense twins, were validated on. Final
    qualities are measured on so many batches as in `write_languages`. Raises DataError if a side is
    missing, if the runs differ in their text, batch or steps, or if there is no language."""
    sparse = [run for run in runs if run.sparse]
    dense = [run for run in runs if not run.sparse]
    if not sparse or not dense:
        raise DataError(
            f"Of {len(runs)} runs {len(sparse)} have switch layers; figures by language need runs "
            "with and without.\n  Name a switch model's run and its dense twin's."
        )
    for run in runs[1:]:
        _check_comparable(runs[0], run)
    first, *others = [run.keys("val/loss/") for run in runs]
    codes = [key.removeprefix("val/loss/") for key in first if all(key in keys for keys in others)]
    if not codes:
        raise DataError(
            "The runs were not validated on any language in common.\n"
            "  Train both on the same mixture, with validate_every above 0."
        )
    switch, twin = (
        _Side(side, [_figures(run, codes, batches) for run in side]) for side in (sparse, dense)
    )
    return [_compare_language(code, switch, twin) for code in codes]


def _check_comparable(first: Run, run: Run) -> None:
    """Raises DataError if losses or steps of the two runs mean different things."""
    sides = (first, run)
    pairs = {
        name: [side.settings.get(name) for side in sides]
        for name in dict.fromkeys([*first.settings, *run.settings])
        if _matters(name)
    }
    for name, key in (("text and tokenizer", "text_digest"), ("tokens", "train_tokens")):
        if all(side.about.get(key) is not None for side in sides):
            pairs[name] = [side.about[key] for side in sides]
    pairs["last step"] = [side.rows[-1]["step"] if side.rows else 0 for side in sides]
    differences = [f"{name} {a} and {b}" for name, (a, b) in pairs.items() if a != b]
    if differences:
        raise DataError(
            f"{first.path} and {run.path} cannot be compared: {'; '.join(differences)}.\n"
            "  Languages are compared between runs of one text, batch and length."
        )


def _matters(setting: str) -> bool:
    """Whether runs that differ in a setting have other rows, losses or steps."""
    same_rows = ("data.cache", "data.workers", "data.prefetch")
    return setting in ("steps", "batch_size", "precision", "validation_batches") or (
        setting.startswith("data.") and setting not in same_rows
    )


def _figures(run: Run, codes: Sequence[str], batches: int) -> dict[str, float]:
    """Of each language the last loss, bits per byte and epochs, as loss/LANGUAGE and so on; with
    `batches` the first two are measured on so many of each language."""
    keys = {"loss": "val/loss", "bits_per_byte": "val/bits_per_byte", "epoch": "epoch"}
    last = {f"{name}/{code}": run.last(f"{keys[name]}/{code}") for name in keys for code in codes}
    figures = {name: value for name, value in last.items() if value is not None}
    if not batches:
        return figures
    logging.getLogger(__name__).info("measuring %s", run.path)
    measured = evaluate_run(run.path, batches=batches * len(codes), batch_size=ROWS)
    if lost := [code for code in codes if f"loss/{code}" not in measured]:
        raise DataError(
            f"There is no text of {', '.join(lost)} here, on which {run.path} was validated.\n"
            "  Install or restore what the run read, or take its last validation: --batches 0."
        )
    return figures | measured


@dataclass(frozen=True)
class _Side:
    """The switch models, or their dense twins, of all seeds."""

    runs: list[Run]
    figures: list[dict[str, float]]

    def curve(self, code: str) -> Curve:
        """The mean of the losses at the steps that all runs have."""
        curves = [run.series(f"val/loss/{code}") for run in self.runs]
        steps = reduce(np.intersect1d, [steps for steps, _ in curves])
        if not len(steps):
            raise DataError("The runs have no validation at the same step. Use one validate_every.")
        return steps, np.mean([y[np.isin(x, steps)] for x, y in curves], axis=0)

    def mean(self, name: str) -> float:
        """The mean of a figure over the runs that have it; nan if none has."""
        values = [figures[name] for figures in self.figures if name in figures]
        return fmean(values) if values else math.nan


def _compare_language(code: str, switch: _Side, dense: _Side) -> LanguageComparison:
    steps, losses = dense.curve(code)
    dense_steps, last = float(steps[-1]), float(losses[-1])
    switch_steps = crossing(*switch.curve(code), last) or math.nan
    about = (switch.runs[0].about.get("corpora") or {}).get(code, {})
    dense_loss, switch_loss = dense.mean(f"loss/{code}"), switch.mean(f"loss/{code}")
    return LanguageComparison(
        code=code,
        language=english_name(code),
        script=script_of(code),
        rate=float(about.get("rate", math.nan)),
        epochs=switch.mean(f"epoch/{code}"),
        dense_quality=-dense_loss,
        switch_quality=-switch_loss,
        improvement=dense_loss - switch_loss,
        dense_bits_per_byte=dense.mean(f"bits_per_byte/{code}"),
        switch_bits_per_byte=switch.mean(f"bits_per_byte/{code}"),
        dense_steps=dense_steps,
        dense_first=crossing(steps, losses, last) or math.nan,
        switch_steps=switch_steps,
        step_speedup=dense_steps / switch_steps,
    )


def summary(languages: Sequence[LanguageComparison]) -> str:
    """Shares and means in a few lines."""
    improvements = [language.improvement for language in languages]
    speedups = [x.step_speedup for x in languages if math.isfinite(x.step_speedup)]
    better = sum(improvement > 0 for improvement in improvements)
    lines = [
        f"{len(languages)} languages",
        f"improved          {better} ({better / len(languages):.0%}), by "
        f"{fmean(improvements):.4f} nats per target token on average",
    ]
    if speedups:
        lines.append(
            f"step speed-up     mean {fmean(speedups):.2f}, median {np.median(speedups):.2f}, over "
            f"the {len(speedups)} that came to the dense twin's final quality"
        )
    lines += [f"at or above {t:.0f}x   {share_at(languages, t):.0%} of all" for t in THRESHOLDS]
    return "\n".join(lines)


def share_at(languages: Sequence[LanguageComparison], threshold: float) -> float:
    """The share of the languages with a step speed-up of `threshold` or more."""
    return fmean(x.step_speedup >= threshold for x in languages)


def write_table(path: Path, languages: Iterable[LanguageComparison]) -> None:
    """Write `path`, a CSV with a language a line."""
    head = [field.name for field in fields(LanguageComparison)]
    _write_csv(path, head, [astuple(language) for language in languages])


def write_routing(out: Path, routing: LanguageRouting) -> None:
    """Experts by language and by script as heat maps, languages alike as a map, and one table."""
    shares = (
        (code, script_of(code), routing.layers[layer], expert, f"{share:.6f}")
        for code, layers in zip(routing.languages, routing.shares, strict=True)
        for (layer, expert), share in np.ndenumerate(layers)
    )
    _write_csv(out / "routing.csv", ["code", "script", "layer", "expert", "share"], shares)
    order = routing.order()
    codes = [routing.languages[place] for place in order]
    rows = [f"{english_name(code)}  {code}, {script_of(code)}" for code in codes]
    scripts, ordered = [script_of(code) for code in codes], routing.shares[order]
    charts.draw_heat(out / "routing.png", rows, routing.layers, ordered)
    kinds = sorted(set(scripts))
    means = np.stack([ordered[np.array(scripts) == script].mean(axis=0) for script in kinds])
    names = [script_name(script) for script in kinds]
    charts.draw_heat(out / "scripts.png", names, routing.layers, means)
    if len(rows) > 1:
        similar = 1 - routing.distances()[np.ix_(order, order)]
        charts.draw_similarity(out / "similarity.png", rows, similar)


def _write_csv(path: Path, head: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    with whole_file(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        for row in rows:
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in row])
