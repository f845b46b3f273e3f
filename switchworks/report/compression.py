"""`switchworks report --compression TEACHER STUDENT ... DENSE`: what smaller models kept, and cost.

All models are measured on the same held-out rows, those of the first run directory among them, in
one process, one after the other.
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
from switchworks.evaluate import DecodingConfig, held_out_losses, measure, questions_of
from switchworks.generate import generate
from switchworks.model import SwitchTransformer, active_parameters, flops_per_token, num_parameters
from switchworks.quantise import grouped, quantise_config_of, tensors_of
from switchworks.report.compression_page import compression_page

ROWS = 16
"""Rows read at once, and texts continued at once."""
NEW_TOKENS = 32
REPEATS = 5
"""A speed is the median of so many, after one that does not count; models take turns."""
EXAMPLES = 256
"""Of each task, evenly spread."""


class _Model(NamedTuple):
    path: Path
    model: SwitchTransformer
    tokenizer: Tokenizer


def write_compression(
    paths: Sequence[Path], output: Path | None = None, *, batches: int = 16
) -> dict[str, Any]:
    """Measure the models in `paths`, write the page and beside it its numbers as JSON.

    The first is the teacher, the last the dense baseline that had no teacher, those between the
    students: smaller models of any kind. By default the page is compression.html in the first
    student's directory. Returns the numbers; "page" says where the page is. Raises ConfigError for
    fewer than three models, CheckpointError for one that cannot be read or reads other tokens.
    """
    if len(paths) < 3:
        raise ConfigError(
            f"--compression compares three models or more, and {len(paths)} are named.\n"
            "  Name the teacher first, then its students, and last the dense baseline."
        )
    data = _text_of(paths)
    opened = _same_tokens([_open(path) for path in paths])
    corpora = open_dataset(data, vocab_size=opened[0].model.config.vocab_size)
    held_out = corpora.held_out(batch_size=ROWS, batches=batches)
    models = [_about(one, held_out, data) for one in opened]
    for about, speeds in zip(models, _speeds(opened, held_out), strict=True):
        about |= speeds
    roles = ["teacher", *(["student"] * (len(paths) - 2)), "baseline"]
    quality = [about["score"] if data.tasks else -about["loss"] for about in models]
    for role, about, value in zip(roles, models, quality, strict=True):
        about["role"], about["quality"] = role, value
        kept = fraction_of_gain(baseline=quality[-1], teacher=quality[0], student=value)
        there = quality[0] > quality[-1] and not math.isnan(kept)  # JSON has no nan
        about["gain_kept"] = kept if there else None
        about["compression"] = 1 - about["parameters"] / models[0]["parameters"]
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
    """Where a file may be put: not among the sealed files of a model."""
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
    """In its own precision and bits."""
    model, tokenizer = load(path) if is_model(path) else open_model(path)
    if tokenizer is None:
        raise CheckpointError(
            f"The model in {path} has no tokenizer, so it cannot be compared on a text.\n"
            "  Put its tokenizer beside its weights."
        )
    return _Model(path, model.to(compute_device()).eval(), tokenizer)


def _same_tokens(opened: list[_Model]) -> list[_Model]:
    for one in opened[1:]:
        if one.tokenizer.fingerprint != opened[0].tokenizer.fingerprint:
            raise CheckpointError(
                f"{opened[0].path} and {one.path} have different tokenizers: their losses are of "
                "different tokens.\n  Compare models of one vocabulary."
            )
        if one.model.config.decoder_only != opened[0].model.config.decoder_only:
            raise CheckpointError(
                f"One of {opened[0].path} and {one.path} is decoder-only and the other is not: "
                "they read different rows.\n  Compare models of one kind."
            )
    return opened


def _about(one: _Model, held_out: ValidationSet, data: DataConfig) -> dict[str, Any]:
    """All that is measured of one model, as plain values."""
    config, rounding = one.model.config, quantise_config_of(one.model)
    print(f"reading held-out text with {one.path}", flush=True)
    loss, _ = held_out_losses(one.model, held_out)
    return {
        "path": str(one.path),
        "kind": _kind(one.model),
        "weights": "float" if rounding is None else rounding.scheme,
        "parameters": num_parameters(config),
        "active_parameters": active_parameters(config),
        "flops_per_token": flops_per_token(config, data.input_length, data.target_length),
        "bytes_on_disk": sum(file.stat().st_size for file in weight_files(one.path)),
        "loss": loss,
        **({"score": _score(one, data)} if data.tasks else {}),
        "tensors": [
            {"names": names, "bits": bits, "bits_with_scales": wide, "bytes": size}
            for names, bits, wide, size in grouped(tensors_of(one.model))
        ],
    }


def _kind(model: SwitchTransformer) -> str:
    routing = model.config.routing
    return "dense" if routing is None else f"{routing.experts} experts"


def _score(one: _Model, data: DataConfig) -> float:
    """Mean over the tasks, out of 100."""
    how, places = DecodingConfig(examples=EXAMPLES, input_length=data.input_length), places_of(data)
    return fmean(
        measure(
            one.model, one.tokenizer, questions_of(task, "validation", places, EXAMPLES), how
        ).score
        for task in tasks_of(data)
    )


def _speeds(opened: Sequence[_Model], held_out: ValidationSet) -> list[dict[str, float]]:
    """Tokens per second of every model, read and written, on the same rows."""
    batch = next(iter(held_out.batches.values()))[0].to(compute_device())
    models = [one.model for one in opened]
    print("timing the models in turns", flush=True)
    read = _in_turns([partial(_read, model, batch) for model in models])
    written = _in_turns([partial(_write, model, batch) for model in models])
    return [
        {"read_tokens_per_second": reads, "written_tokens_per_second": writes}
        for reads, writes in zip(read, written, strict=True)
    ]


def _in_turns(works: Sequence[Callable[[], int]]) -> list[float]:
    """Tokens per second of every work, which says how many it made: A B A B, not A A B B.

    A machine's speed wanders by more than models differ, and so it wanders for all of them.
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
    """Until a GPU, if there is one, has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@torch.no_grad()
def _read(model: SwitchTransformer, batch: Batch) -> int:
    model(**batch.arguments())
    return batch.num_tokens


def _write(model: SwitchTransformer, batch: Batch) -> int:
    """Positions decoded, also those of rows that had ended."""
    given = batch.targets[:, :NEW_TOKENS] if model.config.decoder_only else batch.inputs
    return generate(model, given, max_length=NEW_TOKENS).numel()
