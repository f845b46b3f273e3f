"""Measures a teacher, smaller students and a dense baseline for `report --compression`.

All models are measured on the same held-out rows, those of the first run directory among them, in
one process.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import torch

from switchworks.batch import Batch
from switchworks.checkpoint import is_model, load, open_model, weight_files, write_json
from switchworks.compress import grouped
from switchworks.config import CheckpointError, ConfigError
from switchworks.data import (
    DataConfig,
    Tokenizer,
    ValidationSet,
    open_dataset,
    places_of,
    run_data_config,
    tasks_of,
)
from switchworks.device import compute_device
from switchworks.distil import fraction_of_gain
from switchworks.evaluate import DecodingConfig, build_eval_set, measure, validation_losses
from switchworks.generate import generate
from switchworks.model import SwitchTransformer, active_parameters, flops_per_token, num_parameters
from switchworks.quantise import quantise_config_of, tensors_of
from switchworks.report.compression_page import compression_page

ROWS = 16
"""Rows read at once, and texts continued at once."""
NEW_TOKENS = 32
REPEATS = 5
"""Measurements of a speed, of which the median is taken, after one call to warm up."""
EXAMPLES = 256
"""Examples of each task, evenly spread over the split."""


class _Model(NamedTuple):
    path: Path
    model: SwitchTransformer
    tokenizer: Tokenizer


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
    opened = [_open(path) for path in paths]
    for other in opened[1:]:
        _check_same_tokens(opened[0], other)
    dataset = open_dataset(data, vocab_size=opened[0].model.config.vocab_size)
    held_out = dataset.held_out(batch_size=ROWS, batches=batches)
    models = [_figures(entry, held_out, data) for entry in opened]
    roles = ["teacher", *(["student"] * (len(paths) - 2)), "baseline"]
    quality = [model["score"] if data.tasks else -model["loss"] for model in models]
    speeds = _speeds([entry.model for entry in opened], held_out)
    for role, model, value, speed in zip(roles, models, quality, speeds, strict=True):
        kept = fraction_of_gain(baseline=quality[-1], teacher=quality[0], student=value)
        defined = quality[0] > quality[-1] and not math.isnan(kept)  # JSON has no nan
        model |= speed | {
            "role": role,
            "quality": value,
            "gain_kept": kept if defined else None,
            "compression": 1 - model["parameters"] / models[0]["parameters"],
        }
    rows = list(chain.from_iterable(held_out.batches.values()))
    report = {
        "text": data.named,
        "metric": "mean task score" if data.tasks else "negative log perplexity",
        "target_tokens": sum(int((batch.targets != 0).sum()) for batch in rows),
        "gain": quality[0] - quality[-1],
        "threads": torch.get_num_threads(),
        "models": models,
    }
    page = output or _home(paths[1]) / "compression.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(compression_page(report), encoding="utf-8")
    write_json(page.with_suffix(".json"), report)
    return report | {"page": str(page)}


def _home(path: Path) -> Path:
    """`path` if it is a run directory, else the current one: a model's files are sealed by hash."""
    return path if (path / "experiment.toml").is_file() else Path()


def _text_of(paths: Sequence[Path]) -> DataConfig:
    """The text of the first run directory among them, read with that run's own tokenizer."""
    for path in paths:
        if (data := run_data_config(path)) is not None:
            return replace(data, tokenizer=str(path))
    raise ConfigError(
        "None of the models is in a run directory, so nothing says which text to measure them on.\n"
        "  Name one of them by the directory of the run that made it."
    )


def _open(path: Path) -> _Model:
    """The model as it is stored: its dtype and bits are not changed."""
    model, tokenizer = load(path) if is_model(path) else open_model(path)
    if tokenizer is None:
        raise CheckpointError(
            f"The model in {path} has no tokenizer, so it cannot be compared on a text.\n"
            "  Put its tokenizer beside its weights."
        )
    return _Model(path, model.to(compute_device()).eval(), tokenizer)


def _check_same_tokens(first: _Model, other: _Model) -> None:
    if other.tokenizer.fingerprint != first.tokenizer.fingerprint:
        raise CheckpointError(
            f"{first.path} and {other.path} have different tokenizers: their losses are of "
            "different tokens.\n  Compare models of one vocabulary."
        )
    if other.model.config.decoder_only != first.model.config.decoder_only:
        raise CheckpointError(
            f"One of {first.path} and {other.path} is decoder-only and the other is not: "
            "they read different rows.\n  Compare models of one kind."
        )


def _figures(entry: _Model, held_out: ValidationSet, data: DataConfig) -> dict[str, Any]:
    """Sizes and quality of one model, as plain values."""
    config, quantised = entry.model.config, quantise_config_of(entry.model)
    print(f"reading held-out text with {entry.path}", flush=True)
    loss, _ = validation_losses(entry.model, held_out)
    return {
        "path": str(entry.path),
        "kind": "dense" if config.routing is None else f"{config.routing.experts} experts",
        "weights": "float" if quantised is None else quantised.scheme,
        "parameters": num_parameters(config),
        "active_parameters": active_parameters(config),
        "flops_per_token": flops_per_token(config, data.input_length, data.target_length),
        "bytes_on_disk": sum(file.stat().st_size for file in weight_files(entry.path)),
        "loss": loss,
        **({"score": _score(entry, data)} if data.tasks else {}),
        "tensors": [
            {"names": names, "bits": bits, "bits_with_scales": with_scales, "bytes": size}
            for names, bits, with_scales, size in grouped(tensors_of(entry.model))
        ],
    }


def _score(entry: _Model, data: DataConfig) -> float:
    """Mean over the tasks, out of 100."""
    decoding = DecodingConfig(examples=EXAMPLES, input_length=data.input_length)
    places = places_of(data)
    eval_sets = (build_eval_set(task, "validation", places, EXAMPLES) for task in tasks_of(data))
    return fmean(
        measure(entry.model, entry.tokenizer, eval_set, decoding).score for eval_set in eval_sets
    )


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
    """Tokens per second of each function, which returns its tokens: A B A B, not A A B B.

    The speed of a shared machine drifts by more than models differ; in turns it drifts for all.
    """
    for work in works:
        work()
    rounds = [[_speed(work) for work in works] for _ in range(REPEATS)]
    return [median(speeds) for speeds in zip(*rounds, strict=True)]


def _speed(work: Callable[[], int]) -> float:
    _wait()
    started = time.perf_counter()
    tokens = work()
    _wait()
    return tokens / (time.perf_counter() - started)


def _wait() -> None:
    """Return when a GPU, if there is one, has finished its queue."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@torch.no_grad()
def _read(model: SwitchTransformer, batch: Batch) -> int:
    model(**batch.arguments())
    return batch.num_tokens


def _write(model: SwitchTransformer, batch: Batch) -> int:
    """Number of positions decoded, those of rows that had ended included."""
    given = batch.targets[:, :NEW_TOKENS] if model.config.decoder_only else batch.inputs
    return generate(model, given, max_length=NEW_TOKENS).numel()
