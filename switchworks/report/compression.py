"""Measures a teacher, smaller students and a dense baseline for `report --compression`.

All models are measured on the same held-out rows, those of the first run directory among them, in
one process.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from switchworks.batch import Batch
from switchworks.checkpoint import weight_files
from switchworks.compress import grouped
from switchworks.config import ConfigError
from switchworks.data import (
    DataConfig,
    Tokenizer,
    ValidationSet,
    open_dataset,
    places_of,
    run_data_config,
    tasks_of,
)
from switchworks.device import compute_device, take_turns
from switchworks.disk import write_json, write_text
from switchworks.distil import fraction_of_gain
from switchworks.evaluate import DecodingConfig, build_eval_set, measure, validation_losses
from switchworks.generate import generate
from switchworks.model import SwitchTransformer, active_parameters, flops_per_token, num_parameters
from switchworks.quantise import quantise_config_of, tensors_of
from switchworks.report.compression_page import compression_page
from switchworks.report.routing import open_comparable, page_folder

ROWS = 16
"""Rows read at once, and texts continued at once."""
NEW_TOKENS = 32
REPEATS = 5
"""Measurements of a speed, of which the median is taken."""
EXAMPLES = 256
"""Examples of each task, evenly spread over the split."""


def write_compression(
    paths: Sequence[Path], output: Path | None = None, *, batches: int = 16
) -> dict[str, Any]:
    """Measure the models in `paths`, write the page and beside it its numbers as JSON.

    The first is the teacher, the last the dense baseline that had no teacher, those between are the
    students: smaller models of any kind. By default the page is compression.html in the first
    student's run directory. Returns the numbers, with the path of the page as "page". Raises
    ConfigError for fewer than three models, CheckpointError for one that cannot be read or has
    another tokenizer.
    """
    if len(paths) < 3:
        raise ConfigError(
            f"--compression compares three models or more, and {len(paths)} are named.\n"
            "  Name the teacher first, then its students, and last the dense baseline."
        )
    data = _text_of(paths)
    opened = open_comparable(paths)
    dataset = open_dataset(data, vocab_size=opened[0][0].config.vocab_size)
    held_out = dataset.held_out(batch_size=ROWS, batches=batches)
    models = []
    for path, (model, tokenizer) in zip(paths, opened, strict=True):
        print(f"reading validation text with {path}", flush=True)
        models.append(_figures(path, model, data) | _quality(model, tokenizer, held_out, data))
    speeds = _speeds([model for model, _ in opened], held_out)
    models = [model | speed for model, speed in zip(models, speeds, strict=True)]
    _compare(models)
    rows = list(chain.from_iterable(held_out.batches.values()))
    report = {
        "text": data.named,
        "metric": "mean task score" if data.tasks else "negative log perplexity",
        "target_tokens": sum(int((batch.targets != 0).sum()) for batch in rows),
        "gain": models[0]["quality"] - models[-1]["quality"],
        "threads": torch.get_num_threads(),
        "models": models,
    }
    page = output or page_folder(paths[1]) / "compression.html"
    write_text(page, [compression_page(report)])
    write_json(page.with_suffix(".json"), report)
    return report | {"page": str(page)}


def _compare(models: list[dict[str, Any]]) -> None:
    """Adds each model's role, and its sizes and quality beside the teacher's and the baseline's."""
    roles = ["teacher", *["student"] * (len(models) - 2), "baseline"]
    teacher, baseline = models[0]["quality"], models[-1]["quality"]
    for role, model in zip(roles, models, strict=True):
        kept = fraction_of_gain(baseline=baseline, teacher=teacher, student=model["quality"])
        defined = teacher > baseline and not math.isnan(kept)  # JSON has no nan
        model["role"] = role
        model["gain_kept"] = kept if defined else None
        model["compression"] = 1 - model["parameters"] / models[0]["parameters"]


def _text_of(paths: Sequence[Path]) -> DataConfig:
    """The text of the first run directory among them, read with that run's own tokenizer."""
    for path in paths:
        if (data := run_data_config(path)) is not None:
            return replace(data, tokenizer=str(path))
    raise ConfigError(
        "None of the models is in a run directory, so nothing says which text to measure them on.\n"
        "  Name one of them by the directory of the run that made it."
    )


def _figures(path: Path, model: SwitchTransformer, data: DataConfig) -> dict[str, Any]:
    """Sizes of one model, as plain values."""
    config, quantised = model.config, quantise_config_of(model)
    names = ("names", "bits", "bits_with_scales", "bytes")
    return {
        "path": str(path),
        "kind": "dense" if config.routing is None else f"{config.routing.experts} experts",
        "weights": "float" if quantised is None else quantised.scheme,
        "parameters": num_parameters(config),
        "active_parameters": active_parameters(config),
        "flops_per_token": flops_per_token(config, data.input_length, data.target_length),
        "bytes_on_disk": sum(file.stat().st_size for file in weight_files(path)),
        "tensors": [dict(zip(names, row, strict=True)) for row in grouped(tensors_of(model))],
    }


def _quality(
    model: SwitchTransformer, tokenizer: Tokenizer, held_out: ValidationSet, data: DataConfig
) -> dict[str, float]:
    """The loss and, of runs over tasks, the mean score out of 100, which is then the quality."""
    loss, _ = validation_losses(model, held_out)
    if not data.tasks:
        return {"loss": loss, "quality": -loss}
    decoding = DecodingConfig(examples=EXAMPLES, input_length=data.input_length)
    places = places_of(data)
    eval_sets = [build_eval_set(task, "validation", places, EXAMPLES) for task in tasks_of(data)]
    score = fmean(measure(model, tokenizer, part, decoding).score for part in eval_sets)
    return {"loss": loss, "score": score, "quality": score}


def _speeds(models: Sequence[SwitchTransformer], held_out: ValidationSet) -> list[dict[str, float]]:
    """Tokens per second of every model, read and written, on the same rows."""
    batch = next(iter(held_out.batches.values()))[0].to(compute_device())
    print("timing the models in turns", flush=True)
    read = _in_turns([partial(_read, model, batch) for model in models])
    written = _in_turns([partial(_write, model, batch) for model in models])
    return [
        {"read_tokens_per_second": reads, "written_tokens_per_second": writes}
        for reads, writes in zip(read, written, strict=True)
    ]


def _in_turns(works: Sequence[Callable[[], int]]) -> list[float]:
    """Tokens per second of each function, which returns its tokens."""
    tokens = [work() for work in works]
    times = take_turns(works, REPEATS)
    return [count / median(each) for count, each in zip(tokens, times, strict=True)]


@torch.no_grad()
def _read(model: SwitchTransformer, batch: Batch) -> int:
    model(**batch.arguments())
    return batch.num_tokens


def _write(model: SwitchTransformer, batch: Batch) -> int:
    """Number of positions decoded, those of rows that had ended included."""
    given = batch.targets[:, :NEW_TOKENS] if model.config.decoder_only else batch.inputs
    return generate(model, given, max_length=NEW_TOKENS).numel()
