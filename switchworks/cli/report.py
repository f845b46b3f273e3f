"""`switchworks report RUN_DIR ...`: pages and pictures about finished or running trainings."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from switchworks.cli.parsing import check_writable, parse_flags
from switchworks.config import ConfigError, check_at_least


@dataclass(frozen=True)
class ReportFlags:
    """One self-contained HTML page."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """One run, or several to compare."""
    output: Path | None = None
    """Default: report.html in the first run directory."""
    figures: Path | None = None
    """Also every curve and map of the page as .svg, .pdf and, with the numbers drawn, .csv into
    this folder, in black on white for a paper."""
    languages: Path | None = None
    """Instead of the page: pictures and tables by language, into this folder. Takes runs of a
    switch model and of its dense twin on the same languages, of several seeds if there are."""
    compression: bool = False
    """Instead of the page: how much quality smaller models keep. Takes the teacher first, then its
    students (distilled, pruned, merged, quantised), and last the dense baseline, as directories of
    runs or models. By default compression.html in the first student's run directory, or here, with
    the numbers beside it as JSON."""
    batches: int = 16
    """With --compression: batches of 16 validation rows. With --languages: batches of 64 for each
    language; 0 takes the last validation of the runs."""

    def __post_init__(self) -> None:
        check_at_least(self, "--", 1 if self.compression else 0, "batches")
        if self.compression and self.languages is not None:
            raise ConfigError(
                "--compression and --languages are different reports.\n  Make one after the other."
            )
        if self.figures is not None and (self.compression or self.languages is not None):
            raise ConfigError(
                f"--figures {self.figures} are those of the page of runs.\n"
                "  Leave out --compression and --languages, which have their own."
            )


def run(words: list[str]) -> int:
    """Write one of the three reports, and print where it is."""
    flags = parse_flags(ReportFlags, "report", words)
    check_writable(flags.output)
    from switchworks.report import write_figures, write_languages, write_report

    if flags.compression:
        _compression(flags)
    elif flags.languages is not None:
        print(write_languages(flags.run_dirs, flags.languages, batches=flags.batches))
        print(f"pictures and tables  {flags.languages.resolve()}")
    else:
        print(write_report(flags.run_dirs, flags.output).resolve())
        if flags.figures is not None:
            names = write_figures(flags.run_dirs, flags.figures)
            print(f"{len(names)} figures  {flags.figures.resolve()}")
    return 0


def _compression(flags: ReportFlags) -> None:
    from switchworks.report import write_compression

    report = write_compression(flags.run_dirs, flags.output, batches=flags.batches)
    if not report["gain"] > 0:
        print("The teacher is no better than the baseline, so there is no gain to keep.")
    print(f"{'':<9} {report['metric']:>24} {'gain kept':>10} {'parameters':>14} {'bytes':>14}")
    for model in report["models"]:
        kept = "-" if model["gain_kept"] is None else f"{model['gain_kept']:.1%}"
        print(
            f"{model['role']:<9} {model['quality']:>24.4f} {kept:>10} "
            f"{model['parameters']:>14,} {model['bytes_on_disk']:>14,}  {model['path']}"
        )
    print(Path(report["page"]).resolve())
