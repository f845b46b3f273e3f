"""What a run says before its first step: its text, model and machine, and what in them is likely a
mistake."""

from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchworks import data, report
from switchworks.training.experiment import Experiment

if TYPE_CHECKING:
    from switchworks.data import TaskRows, TextDataset, ValidationSet

    Batches = data.Pipeline | data.Mixture

MOST_EPOCHS = 8.0
"""Readings of a text after which a model learns it by heart."""
FEWEST_ROWS = 100
"""Validation rows below which their loss wavers by more than most settings change it."""
MOST_CUT = 0.1
"""Share of the examples whose inputs or targets may lose their end."""
MISTYPED = 0.02
"""A label this much rarer than one spelt nearly alike is likely a mistake for it."""


def opening(
    experiment: Experiment,
    run_dir: Path,
    about: Mapping[str, Any],
    dataset: "TextDataset",
    batches: "Batches",
    validation: "ValidationSet | None",
) -> str:
    """The lines to print; `about` is what about.json holds."""
    lines = {
        "text": _amounts(dataset, "train"),
        "validation": "none" if validation is None else _amounts(dataset, "validation"),
        "reading": _reading(experiment, batches),
        "model": _model(about),
        "optimizer": f"{experiment.optim.name}, rate {experiment.optim.lr:g}, schedule "
        f"{experiment.optim.schedule}, {experiment.optim.warmup_steps:,} steps of warm-up",
        "machine": f"{about['machine']}, {about['threads']} threads",
        "computes in": f"{experiment.precision}, {experiment.kernels} kernels",
        "run": str(run_dir.resolve()),
    }
    for name, counts in dataset.label_counts.items():
        largest = sorted(counts.items(), key=lambda pair: -pair[1])
        told = [f"{label!r} {number:,}" for label, number in largest[:6]]
        lines[f"labels of {name}"] = ", ".join(told) + (", ..." if len(counts) > 6 else "")
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def mistakes(
    experiment: Experiment,
    dataset: "TextDataset",
    batches: "Batches",
    validation: "ValidationSet | None",
) -> Iterator[str]:
    """What is likely no intention, with what to do."""
    for name, epochs in _epochs(experiment, batches).items():
        if epochs > MOST_EPOCHS:
            label = f" {name}" if name else ""
            yield (
                f"The text{label} is read {epochs:.1f} times.\n  Past {MOST_EPOCHS:g} a model "
                "learns it by heart: give more text, or lower --steps."
            )
    if validation is not None and (rows := _rows(validation)) < FEWEST_ROWS:
        yield (
            f"The validation loss is that of {rows} rows, so it wavers.\n  Raise "
            "--validation-batches or --data.validation-share."
        )
    for name, part in getattr(batches, "parts", {}).items():
        if isinstance(part, data.TaskRows):
            yield from _cut(name, part)
    for name, counts in dataset.label_counts.items():
        for label, other in labels_alike(counts):
            yield (
                f"{name}: the label {label!r} ({counts[label]:,} times) looks like {other!r} "
                f"({counts[other]:,} times).\n  If they are one, write both alike."
            )


def labels_alike(counts: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """(the rarer, the other) of each two labels that differ in case or white space alone, and of
    each much rarer one that differs from another by a letter or so."""
    labels = sorted(counts, key=lambda label: (counts[label], label))
    for place, rarer in enumerate(labels):
        for other in labels[place + 1 :]:
            same = rarer.strip().casefold() == other.strip().casefold()
            rare = counts[rarer] < MISTYPED * counts[other]
            if same or (rare and SequenceMatcher(None, rarer, other).ratio() > 0.8):
                yield rarer, other
                break


def _amounts(dataset: "TextDataset", split: str) -> str:
    stores = [store for part in dataset.parts.values() if (store := getattr(part, split))]
    kind = "examples" if dataset.config.tasks else "documents"
    documents = sum(store.num_documents for store in stores)
    tokens = sum(store.num_tokens for store in stores)
    return f"{documents:,} {kind} of {report.compact(tokens)} tokens"


def _reading(experiment: Experiment, batches: "Batches") -> str:
    steps, epochs = experiment.num_steps, _epochs(experiment, batches)
    least, most = min(epochs.values()), max(epochs.values())
    times = f"{least:.2g}" if least == most else f"{least:.2g} to {most:.2g}"
    return f"{steps:,} steps of {experiment.batch_size} rows: {times} epochs"


def _epochs(experiment: Experiment, batches: "Batches") -> dict[str, float]:
    """How many times each corpus or task is read; a single corpus is named ""."""
    if isinstance(batches, data.Mixture):
        return batches.epochs(experiment.num_steps)
    return {"": experiment.num_steps * experiment.batch_size / batches.windows}


def _model(about: Mapping[str, Any]) -> str:
    total, active = report.compact(about["parameters"]), report.compact(about["active_parameters"])
    text = f"{total} parameters, {active} for each token"
    if about["trainable_parameters"] != about["parameters"]:
        text += f", {report.compact(about['trainable_parameters'])} of them trained"
    return f"{text}; {report.compact(about['flops_per_token'])} FLOPs a token forward"


def _rows(validation: "ValidationSet") -> int:
    return sum(len(batch.targets) for rows in validation.batches.values() for batch in rows)


def _cut(name: str, rows: "TaskRows") -> Iterator[str]:
    for number, kind in zip(rows.cut, ("input", "target"), strict=True):
        if (share := number / len(rows.store)) > MOST_CUT:
            yield (
                f"{name}: {share:.0%} of the {kind}s lose their end, being longer than "
                f"data.{kind}_length = {getattr(rows.config, f'{kind}_length')}.\n  Raise it."
            )
