"""GLUE as in T5: nine tasks, counting both of MNLI's validation sets, and WNLI."""

import numpy as np

from switchworks.data.tasks.sources import Hub, Record
from switchworks.data.tasks.task import UNKNOWN, Example, Task, classify, fields

_DATASET = "nyu-mll/glue"

NLI = ("entailment", "neutral", "contradiction")
TWO_WAY = ("entailment", "not_entailment")


def stsb(record: Record) -> Example:
    """A similarity from 0 to 5 as the nearest of 0.0, 0.2, ... 5.0; in float32, halves to even."""
    label = record["label"]
    fifths = np.round(np.float32(-1 if label in ("", None) else label) * np.float32(5))
    return Example(
        inputs=fields("stsb", record, ("sentence1", "sentence2")),
        target=UNKNOWN if fifths < 0 else f"{fifths / 5:.1f}",
    )


def _task(
    name: str,
    columns: tuple[str, ...],
    labels: tuple[str, ...],
    *,
    metrics: tuple[str, ...] = ("accuracy",),
    config: str | None = None,
    names: dict[str, str] | None = None,
    folder: str | None = None,
    text: str | None = None,
) -> Task:
    names = names or {"train": "train", "validation": "validation", "test": "test"}
    return Task(
        name=f"glue_{name}",
        source=Hub(
            dataset=_DATASET, config=config or name, folder=folder or f"glue_{name}", names=names
        ),
        to_text=classify(text or name, columns, labels),
        metrics=metrics,
        labels=labels,
    )


GLUE = (
    _task("cola", ("sentence",), ("unacceptable", "acceptable"), metrics=("matthews",)),
    _task("sst2", ("sentence",), ("negative", "positive")),
    _task(
        "mrpc",
        ("sentence1", "sentence2"),
        ("not_equivalent", "equivalent"),
        metrics=("f1_binary", "accuracy"),
    ),
    Task(
        name="glue_stsb",
        source=Hub(dataset=_DATASET, config="stsb", folder="glue_stsb"),
        to_text=stsb,
        metrics=("pearson", "spearman"),
        labels=tuple(f"{fifths / 5:.1f}" for fifths in range(26)),
    ),
    _task(
        "qqp",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        metrics=("f1_binary", "accuracy"),
    ),
    _task(
        "mnli",
        ("hypothesis", "premise"),
        NLI,
        names={"train": "train", "validation": "validation_matched", "test": "test_matched"},
    ),
    _task(
        "mnli_mismatched",
        ("hypothesis", "premise"),
        NLI,
        config="mnli",
        folder="glue_mnli",
        text="mnli",
        names={"validation": "validation_mismatched", "test": "test_mismatched"},
    ),
    _task("qnli", ("question", "sentence"), TWO_WAY),
    _task("rte", ("sentence1", "sentence2"), TWO_WAY),
    _task("wnli", ("sentence1", "sentence2"), ("not_entailment", "entailment")),
)
