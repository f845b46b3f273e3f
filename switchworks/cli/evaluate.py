"""`switchworks evaluate PATH`: validation loss of a model, or its answers to tasks."""

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from switchworks import evaluate
from switchworks.checkpoint import state_at
from switchworks.cli import parsing
from switchworks.config import ConfigError, check_at_least
from switchworks.data import DataConfig
from switchworks.disk import write_json

_TABLES = ("labels", "metrics", "delimiter", "quoting", "skip_bad")


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags:
    """Measure a trained model: on tasks, or if there are none by its validation loss."""

    path: tyro.conf.Positional[Path]
    """A run directory or one of its checkpoints; with --tasks or --text a model directory, too."""
    step: int | None = None
    """Of a run: its checkpoint of this step, in place of its model."""
    text: str | None = None
    """Measure the loss on all of this file, folder or glob, in place of the run's validation
    text."""
    tasks: tuple[str, ...] = ()
    """What to measure: glue_rte, super_glue, NAME=PATH:INPUT:TARGET, task.py, ... Default: what
    the run was trained on, if that is tasks."""
    task_folder: Path | None = None
    """Folder with local copies of the tasks' datasets, one folder per task. Default: the Hub."""
    task_labels: tuple[str, ...] = ()
    """For tables NAME=PATH:INPUT:TARGET: every possible target."""
    task_metrics: tuple[str, ...] = ()
    """For such tables: accuracy, squad, rouge, bleu, chrf, f1_macro, ... Labels and metrics are by
    default those of the run for a table of that name; else accuracy of any text."""
    task_delimiter: str | None = None
    """Between the columns of .csv and .tsv tables whose first lines do not tell: one character or
    tab."""
    task_quoting: Literal["auto", "on", "off"] = "auto"
    """Whether a quote at the beginning of a cell encloses it. auto: in .csv, not in .tsv."""
    task_skip_bad: bool = False
    """Leave out and count the records that cannot be read, in place of stopping at the first."""
    split: Literal["train", "validation", "test", "all"] = "validation"
    """Of each task. all: the whole of a table that is one file, which training would split."""
    decoding: tyro.conf.OmitArgPrefixes[evaluate.DecodingConfig] = field(
        default_factory=evaluate.DecodingConfig
    )
    """How answers are written."""
    precision: parsing.Precision = "stored"
    """What to compute in: as the weights are stored (float32 after training), or auto, which is
    bfloat16 where this machine multiplies it faster."""
    expert_memory: str | None = None
    """Memory for experts, such as 512MB, 2GB or 1.5GiB: the others stay on disk, and are read when
    they have tokens. Default: all are in memory."""
    batches: int = 32
    """Batches of 16 rows for the validation loss."""
    json: Path | None = None
    """Also write the figures to this file, with the exact command."""
    predictions: Path | None = None
    """Also write every input and answer to this file, a JSON object per line."""
    html: Path | None = None
    """Also write a page about tasks that are classifications to this file: accuracy beside
    baselines, every class, which is taken for which, and the worst answers."""

    def __post_init__(self) -> None:
        parsing.check_decoding(self.decoding)
        parsing.parse_bytes(self.expert_memory, "--expert-memory")
        check_at_least(self, "--", 1, "batches")

    @property
    def weights(self) -> dict[str, Any]:
        """Settings to load the model with."""
        memory = parsing.parse_bytes(self.expert_memory, "--expert-memory")
        return {"dtype": parsing.dtype_of(self.precision), "expert_memory": memory}

    def check_used(self, *, tasks: bool) -> None:
        """Raises ConfigError for a flag that is unused where tasks are measured, or are not."""
        tables = [f"task_{name}" for name in _TABLES]
        for name in ("split", "predictions", "html", "task_folder", *tables):
            parsing.check_needed(self, name, "--tasks", given=tasks)
        for name in ("decode", "examples", "input_length", "max_length", "batch_size", "beams"):
            parsing.check_needed(self.decoding, name, "--tasks", given=tasks)
        parsing.check_needed(self.decoding, "compile", "--tasks", given=tasks)
        parsing.check_needed(self.decoding.sampling, "temperature", "--tasks", given=tasks)
        parsing.check_needed(self, "batches", "the validation loss, without tasks", given=not tasks)


def run(words: list[str]) -> int:
    """Print the figures, and write the files that the flags name."""
    flags = parsing.parse_flags(EvaluateFlags, "evaluate", words)
    flags = replace(flags, path=state_at(flags.path, flags.step))
    parsing.check_writable(flags.json, flags.predictions, flags.html)
    if flags.tasks and flags.text is not None:
        raise ConfigError(
            f"--tasks {' '.join(flags.tasks)} and --text {flags.text} ask for different figures.\n"
            "  Measure one after the other."
        )
    command = shlex.join(["switchworks", "evaluate", *words])
    tables = {name: getattr(flags, f"task_{name}") for name in _TABLES}
    data = evaluate.named_tasks(flags.path, flags.tasks, flags.task_folder, **tables)
    with_tasks = bool(data.tasks) and flags.text is None
    flags.check_used(tasks=with_tasks)
    if with_tasks:
        text, figures = _evaluate_tasks(flags, data, command)
    else:
        figures = evaluate.evaluate_run(
            flags.path, batches=flags.batches, text=flags.text, **flags.weights
        )
        lines = [
            f"{name:<24} {value:.4g}" if isinstance(value, float) else f"{name:<24} {value}"
            for name, value in figures.items()
        ]
        text = "\n".join(lines)
        figures["command"] = command
    if flags.json is not None:
        write_json(flags.json, figures)
    print(text)
    return 0


def _evaluate_tasks(
    flags: EvaluateFlags, data: DataConfig, command: str
) -> tuple[str, dict[str, Any]]:
    """The table of the tasks' figures, and the same as plain values. Writes --predictions and
    --html."""
    length = flags.decoding.input_length or data.input_length
    config, weights = replace(flags.decoding, input_length=length), flags.weights
    results = evaluate.evaluate_tasks(flags.path, data, config, split=flags.split, **weights)
    if flags.predictions is not None:
        evaluate.write_predictions(flags.predictions, results)
    if flags.html is not None:
        from switchworks.report import write_classes_page

        classes = evaluate.measure_classes(flags.path, data, config, split=flags.split, **weights)
        write_classes_page(flags.html, flags.path.resolve().name, classes, command)
    figures = evaluate.as_json(results, config, str(flags.path), command)
    return evaluate.as_table(results), figures
