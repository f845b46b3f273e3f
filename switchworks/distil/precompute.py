"""`switchworks prepare RECIPE --distil.store D`: the teacher runs once, ahead of its students."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from switchworks.batch import Batch
from switchworks.checkpoint import weights_hash
from switchworks.config import ConfigError
from switchworks.data import open_dataset
from switchworks.device import compute_device
from switchworks.distil.store import Dtype, LogitStore, LogitWriter, is_store
from switchworks.distil.teacher import about_store, open_teacher
from switchworks.fast import skip_losses, use_fast_kernels
from switchworks.model import SwitchTransformer
from switchworks.training import (
    Experiment,
    cast_for_compute,
    forward,
    machine,
    resolve_precision,
    resolve_vocabulary,
)


def precompute_teacher(experiment: Experiment, *, top_k: int = 32, dtype: Dtype = "float16") -> str:
    """`experiment.distil.store` holds the teacher's probabilities for every row of `experiment`.

    What an earlier call left is gone on with; says what there is, in a few lines. The rows are
    those of any run with the same text, tokenizer, row lengths and seed, up to this number of them.
    Raises CheckpointError if there is no such teacher, ConfigError if the folder holds other
    probabilities.
    """
    distil = experiment.distil
    if distil is None or distil.store is None:
        raise ConfigError(
            "There is no folder for the teacher's probabilities.\n  Give one: --distil.store DIR."
        )
    machine.keep_freed_memory()
    if experiment.threads:
        torch.set_num_threads(experiment.threads)
    folder = Path(distil.store)
    if experiment.precision == "auto" and is_store(folder):
        experiment = replace(experiment, precision=LogitStore(folder).info.precision)
    experiment = resolve_precision(experiment, folder)
    teacher = open_teacher(experiment)
    assert teacher is not None
    corpora = open_dataset(experiment.data, vocab_size=experiment.model.vocab_size)
    experiment = resolve_vocabulary(experiment, teacher.model.config.vocab_size)
    teacher.require_same_ids(corpora.tokenizer, experiment.model.vocab_size)
    weights = weights_hash(Path(teacher.path))
    info = about_store(experiment, corpora.tokenizer, top_k, dtype, weights)
    writer = LogitWriter(folder, info)
    cast_for_compute(teacher.model, getattr(torch, experiment.precision))
    teacher.model.to(compute_device())
    if experiment.kernels == "fast":
        use_fast_kernels(teacher.model, compute_device())
    batches = corpora.training(batch_size=experiment.batch_size, seed=experiment.seed)
    _write(writer, teacher.model.eval(), batches.batch, experiment)
    return summary(LogitStore(writer.folder))


@torch.no_grad()
def _write(
    writer: LogitWriter,
    model: SwitchTransformer,
    batch_of: Callable[[int], Batch],
    experiment: Experiment,
) -> None:
    """Every row up to the last of the last step, from the first that is missing."""
    size, total = experiment.batch_size, experiment.steps * experiment.batch_size
    for step in range(writer.written // size, experiment.steps):
        batch, skipped = batch_of(step), max(0, writer.written - step * size)
        batch = batch.to(model.embedding.weight.device)
        parts = [batch.take(torch.arange(skipped, size))] if skipped else None
        before = writer.written
        for part in parts or batch.split(experiment.micro_batches):
            with skip_losses(model):
                logits = forward(model, part).logits
            writer.add(part, logits)
        if writer.written != before:
            print(f"rows {writer.written:,} of {total:,}", flush=True)
    writer.flush()


def summary(store: LogitStore) -> str:
    """What a store holds and what it takes on the disk, in two lines."""
    info, targets = store.info, max(1, store.num_targets)
    live = info.vocab_size * 4
    return (
        f"{store.folder} holds the {info.top_k} likeliest of {info.vocab_size:,} ids for "
        f"{store.num_targets:,} targets in {store.num_rows:,} rows.\n"
        f"{store.num_bytes / 1e6:,.1f} MB: {store.num_bytes / targets:.1f} bytes per target "
        f"({info.bytes_per_target} for ids and logarithms; all logits in float32 take {live:,})."
    )
