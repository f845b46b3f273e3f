"""The folder of a report by language: two tables, and the pictures of `charts.py`.

Steps come from the runs' metrics, final qualities from their models on more held-out text, routing
from the first switch model.
"""

import csv
import logging
from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields, replace
from pathlib import Path
from statistics import fmean

import numpy as np

from switchworks.config import DataError
from switchworks.data import english_name, script_name, script_of
from switchworks.evaluate import LanguageRouting, evaluate_run, open_run, routing_by_language
from switchworks.report.languages.charts import (
    draw_heat,
    draw_quality,
    draw_similarity,
    draw_speedups,
)
from switchworks.report.languages.compare import LanguageComparison, compare, summary
from switchworks.report.runs import Run, read_run

ROWS = 64
"""Rows of a batch that final qualities are measured on."""
ROUTED = 4
"""Batches of each language that routing is counted on: with fewer tokens languages that are routed
alike would differ by chance."""


def write_languages(run_dirs: Sequence[Path], out: Path, *, batches: int = 16) -> str:
    """Write pictures and tables about the runs in `run_dirs` into the folder `out`.

    Returns the summary. Final qualities are measured as in `measure_quality`, or are those of the
    last validation if `batches` is 0. Raises DataError as `compare` does, CheckpointError if a
    model cannot be opened.
    """
    runs = [read_run(Path(path)) for path in run_dirs]
    languages = compare(runs)
    if batches:
        languages = measure_quality(languages, runs, batches=batches)
    out.mkdir(parents=True, exist_ok=True)
    write_table(out / "languages.csv", languages)
    draw_quality(
        out / "quality.png",
        [language.code for language in languages],
        [language.dense_quality for language in languages],
        [language.switch_quality for language in languages],
    )
    draw_speedups(out / "speedups.png", [language.step_speedup for language in languages])
    model, dataset = open_run(next(run for run in runs if run.sparse).path)
    held_out = dataset.held_out(batch_size=ROWS, batches=ROUTED * len(languages))
    write_routing(out, routing_by_language(model, held_out.batches))
    return summary(languages)


def measure_quality(
    languages: Sequence[LanguageComparison], runs: Sequence[Run], *, batches: int
) -> list[LanguageComparison]:
    """`languages` with qualities of the models in `runs` on `batches` batches of 64 rows each.

    Of a language with less held-out text all whole batches are read. While a run trains it reads
    `validation_batches`, which for a hundred languages is little of each: too little for
    differences of hundredths of a nat. Raises CheckpointError if a model cannot be opened,
    DataError if the text of a language is gone.
    """
    sides: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for run in runs:
        logging.getLogger(__name__).info("measuring %s", run.path)
        figures = evaluate_run(run.path, batches=batches * len(languages), batch_size=ROWS)
        if lost := [x.code for x in languages if f"loss/{x.code}" not in figures]:
            raise DataError(
                f"There is no text of {', '.join(lost)} here, on which {run.path} was validated.\n"
                "  Install or restore what the run read, or take its last validation: --batches 0."
            )
        sides[run.sparse].append(figures)

    def mean(sparse: bool, name: str) -> float:
        return fmean(figures[name] for figures in sides[sparse])

    return [
        replace(
            language,
            dense_quality=-mean(False, f"loss/{language.code}"),
            switch_quality=-mean(True, f"loss/{language.code}"),
            improvement=mean(False, f"loss/{language.code}") - mean(True, f"loss/{language.code}"),
            dense_bits_per_byte=mean(False, f"bits_per_byte/{language.code}"),
            switch_bits_per_byte=mean(True, f"bits_per_byte/{language.code}"),
        )
        for language in languages
    ]


def write_table(path: Path, languages: Iterable[LanguageComparison]) -> None:
    """Write `path`, a CSV with a language a line."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(LanguageComparison)])
        for language in languages:
            values = astuple(language)
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])


def write_routing(out: Path, routing: LanguageRouting) -> None:
    """Experts by language and by script as heat maps, languages alike as a map, and one table."""
    with (out / "routing.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["code", "script", "layer", "expert", "share"])
        for code, layers in zip(routing.languages, routing.shares, strict=True):
            for layer, shares in zip(routing.layers, layers, strict=True):
                for expert, share in enumerate(shares):
                    writer.writerow([code, script_of(code), layer, expert, f"{share:.6f}"])
    order = routing.order()
    codes = [routing.languages[place] for place in order]
    rows = [f"{english_name(code)}  {code}" for code in codes]
    scripts, ordered = [script_of(code) for code in codes], routing.shares[order]
    draw_heat(out / "routing.png", rows, scripts, routing.layers, ordered)
    kinds = sorted(set(scripts))
    means = np.stack([ordered[np.array(scripts) == script].mean(axis=0) for script in kinds])
    names = [script_name(script) for script in kinds]
    draw_heat(out / "scripts.png", names, kinds, routing.layers, means)
    if len(rows) > 1:
        similar = 1 - routing.distances()[np.ix_(order, order)]
        draw_similarity(out / "similarity.png", rows, scripts, similar, routing.tree())
