"""The report of a run, or of several compared, as one file."""

import os
from collections.abc import Sequence
from pathlib import Path

from switchworks.config import DataError
from switchworks.report.page import page
from switchworks.report.runs import read_run


def write_report(run_dirs: Sequence[Path], output: Path | None = None) -> Path:
    """Write one self-contained HTML page about the runs in `run_dirs`, and return where it is.

    By default the page is report.html in the run directory, or for several runs comparison.html
    in the first of them. Raises DataError for a directory that holds no run.
    """
    if not run_dirs:
        raise DataError("A report needs at least one run directory. Name the one to report on.")
    runs = [read_run(Path(path)) for path in run_dirs]
    name = "report.html" if len(runs) == 1 else "comparison.html"
    target = runs[0].path / name if output is None else Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    aside.write_text(page(runs), encoding="utf-8")
    aside.replace(target)
    return target
