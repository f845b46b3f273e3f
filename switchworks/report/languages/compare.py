"""A switch model and its dense twin language by language: qualities and step speed-ups.

For one pair of runs, or several with other seeds, whose losses are averaged step by step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from statistics import fmean

import numpy as np
from jaxtyping import Float

from switchworks.config import DataError
from switchworks.data import english_name, script_of
from switchworks.report.runs import Run, crossing

LOSS, BITS = "val/loss/", "val/bits_per_byte/"
THRESHOLDS = (1.0, 2.0, 4.0)
"""Of the step speed-up; the paper has 91 % of its languages at 4 or more."""

Curve = tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]
"""Steps, and a loss at each."""


@dataclass(frozen=True, kw_only=True)
class LanguageComparison:
    """A switch model and its dense twin on one language; more is better in a quality."""

    code: str
    language: str
    script: str
    rate: float
    """Share of the rows to train on."""
    epochs: float
    """Passes over its text in training."""
    dense_quality: float
    """Negative log perplexity: minus the last held-out loss, in nats per target token."""
    switch_quality: float
    improvement: float
    dense_bits_per_byte: float
    switch_bits_per_byte: float
    dense_steps: float
    """Steps of the dense twin."""
    dense_first: float
    """Steps to the twin's final quality for the first time: fewer where it overfitted later."""
    switch_steps: float
    """Steps of the switch model to the twin's final quality; nan if it never reached it."""
    step_speedup: float
    """dense_steps over switch_steps; nan if the switch model never reached that quality."""


def compare(runs: Sequence[Run]) -> list[LanguageComparison]:
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
    for run in runs[1:]:
        _check_comparable(runs[0], run)
    languages = [_compare_language(code, sparse, dense) for code in _languages(runs)]
    if not languages:
        raise DataError(
            "The runs were not validated on any language in common.\n"
            "  Train both on the same mixture, with validate_every above 0."
        )
    return languages


def _check_comparable(first: Run, run: Run) -> None:
    """Raises DataError if losses or steps of the two runs mean different things."""
    differences = [
        f"{name} {first.settings.get(name)} and {run.settings.get(name)}"
        for name in dict.fromkeys([*first.settings, *run.settings])
        if _matters(name) and first.settings.get(name) != run.settings.get(name)
    ]
    for name, key in (("text and tokenizer", "text_digest"), ("tokens", "train_tokens")):
        values = [side.about.get(key) for side in (first, run)]
        if None not in values and values[0] != values[1]:
            differences.append(f"{name} {values[0]} and {values[1]}")
    ends = [side.rows[-1]["step"] if side.rows else 0 for side in (first, run)]
    if ends[0] != ends[1]:
        differences.append(f"last step {ends[0]} and {ends[1]}")
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


def _languages(runs: Sequence[Run]) -> list[str]:
    """Languages that all runs were validated on, in the order of the first run's metrics."""
    noted = [
        dict.fromkeys(k.removeprefix(LOSS) for row in run.rows for k in row if k.startswith(LOSS))
        for run in runs
    ]
    return [name for name in noted[0] if all(name in others for others in noted)]


def _compare_language(code: str, sparse: Sequence[Run], dense: Sequence[Run]) -> LanguageComparison:
    switch_curve, dense_curve = (
        _mean_curve([run.series(LOSS + code) for run in side]) for side in (sparse, dense)
    )
    dense_loss, switch_loss = float(dense_curve[1][-1]), float(switch_curve[1][-1])
    dense_first, switch_steps = (
        math.nan if step is None else step
        for step in (crossing(*dense_curve, dense_loss), crossing(*switch_curve, dense_loss))
    )
    dense_steps = float(dense_curve[0][-1])
    corpora = sparse[0].about.get("corpora")
    about = corpora.get(code, {}) if isinstance(corpora, dict) else {}
    return LanguageComparison(
        code=code,
        language=english_name(code),
        script=script_of(code),
        rate=float(about.get("rate", math.nan)),
        epochs=_mean_last(sparse, f"epoch/{code}"),
        dense_quality=-dense_loss,
        switch_quality=-switch_loss,
        improvement=dense_loss - switch_loss,
        dense_bits_per_byte=_mean_last(dense, BITS + code),
        switch_bits_per_byte=_mean_last(sparse, BITS + code),
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


def _mean_last(runs: Sequence[Run], key: str) -> float:
    """The mean over the runs of their last value of `key`; nan if none has one."""
    values = [value for run in runs if (value := run.last(key)) is not None]
    return fmean(values) if values else math.nan


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
    return sum(x.step_speedup >= threshold for x in languages) / len(languages)
