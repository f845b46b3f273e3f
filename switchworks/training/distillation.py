"""What a run with a teacher does beside training; imported only if the experiment has one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from switchworks import distil
from switchworks.batch import Batch
from switchworks.compress import dense_equivalent, reduce_experts
from switchworks.config import ConfigError, to_dict
from switchworks.data import TextDataset, Tokenizer, open_dataset
from switchworks.device import compute_device
from switchworks.fast import skip_losses, use_fast_kernels
from switchworks.locks import only_writer
from switchworks.model import SwitchTransformer
from switchworks.progress import tracked
from switchworks.training import machine
from switchworks.training.experiment import Experiment
from switchworks.training.resolve import kernels_of, resolve_auto, resolve_vocabulary
from switchworks.training.state import cast_for_compute

COUNTED_ROWS, COUNT_BATCH = 512, 16
"""Rows on which the use of the teacher's experts is counted, and how many at once."""

NOT_CONTENT = ("cache", "workers", "prefetch", "tokenizer")
"""Data settings that change no row; of the tokenizer the fingerprint is compared."""


def require_fit(
    teacher: distil.TeacherSource,
    experiment: Experiment,
    tokenizer: Tokenizer,
    first: Batch,
    rows: range,
) -> None:
    """Raises CheckpointError or DataError unless the teacher has the student's vocabulary and, if
    stored, covers its rows; `first` is this rank's first batch, of the rows `rows`."""
    if isinstance(teacher, distil.Teacher):
        teacher.require_same_ids(tokenizer, experiment.model.vocab_size)
        return
    info = teacher.info
    here = store_info(experiment, tokenizer, info.top_k, info.dtype, info.weights)
    num_rows = experiment.num_steps * experiment.batch_size
    distil.require_same_rows(teacher, here, num_rows, first, rows)


def initialise_student(
    student: SwitchTransformer,
    teacher: distil.TeacherSource,
    experiment: Experiment,
    dataset: TextDataset,
) -> None:
    """Copies the teacher's weights that fit to `student`, and prints how many do."""
    config = experiment.distil
    assert config is not None
    if isinstance(teacher, distil.LogitStore):  # its probabilities are stored, its weights are not
        teacher = distil.open_teacher(config, decoder_only=experiment.model.decoder_only)
    source = teacher.model
    if config.ffn != "fresh":
        source = dense_teacher(source, rows_to_count(dataset, experiment.seed), config.ffn)
    copied, fresh = distil.initialise_from_teacher(student, source)
    print(f"student: {len(copied)} of {len(copied) + len(fresh)} tensors from {teacher.path}")
    if fresh:
        print(f"  fresh: {', '.join(fresh[:6])}{', ...' if len(fresh) > 6 else ''}")


def dense_teacher(
    teacher: SwitchTransformer, batches: Sequence[Batch], ffn: Literal["average", "most_used"]
) -> SwitchTransformer:
    """`teacher` with one FFN in place of each layer's experts, as a source of initial weights.

    "average": the mean of all experts weighted by their use on `batches`, hidden units aligned.
    "most_used": the expert that most tokens choose. Both are scaled by the gates of their tokens.
    """
    method = "merge" if ffn == "average" else "prune"
    return dense_equivalent(reduce_experts(teacher, batches, 1, method=method).model)


def rows_to_count(dataset: TextDataset, seed: int) -> list[Batch]:
    """The first COUNTED_ROWS rows of the run in small batches. Of the whole run, not of one rank:
    every rank must start with the same weights."""
    pipeline = dataset.training(batch_size=COUNT_BATCH, seed=seed)
    return [pipeline.batch(step) for step in range(COUNTED_ROWS // COUNT_BATCH)]


def store_info(
    experiment: Experiment, tokenizer: Tokenizer, top_k: int, dtype: distil.Dtype, weights: str
) -> distil.StoreInfo:
    """The info of a store with the teacher's probabilities for the rows of `experiment`."""
    assert experiment.distil is not None
    data = to_dict(experiment.data)
    return distil.StoreInfo(
        teacher=experiment.distil.teacher,
        weights=weights,
        tokenizer=tokenizer.fingerprint,
        vocab_size=experiment.model.vocab_size,
        top_k=top_k,
        temperature=experiment.distil.temperature,
        dtype=dtype,
        precision=experiment.precision,
        seed=experiment.seed,
        data={name: value for name, value in data.items() if name not in NOT_CONTENT},
    )


def precompute_teacher(
    experiment: Experiment, *, top_k: int = 32, dtype: distil.Dtype = "float16"
) -> str:
    """Writes the teacher's probabilities for every row of `experiment` to `distil.store`.

    Continues what an earlier call left; returns a summary in two lines. The rows are those of any
    run with the same text, tokenizer, row lengths and seed, up to this number of rows. Raises
    CheckpointError if there is no such teacher, ConfigError if the folder holds another store.
    """
    config = experiment.distil
    if config is None or config.store is None:
        raise ConfigError(
            "There is no folder for the teacher's probabilities.\n  Give one: --distil.store DIR."
        )
    machine.prepare(experiment.threads)
    folder = Path(config.store)
    if experiment.precision == "auto" and distil.is_store(folder):
        experiment = replace(experiment, precision=distil.LogitStore(folder).info.precision)
    experiment = resolve_auto(experiment, folder)
    teacher = distil.open_teacher(config, decoder_only=experiment.model.decoder_only)
    dataset = open_dataset(experiment.data, vocab_size=experiment.model.vocab_size)
    experiment = resolve_vocabulary(experiment, teacher.vocab_size)
    teacher.require_same_ids(dataset.tokenizer, experiment.model.vocab_size)
    info = store_info(experiment, dataset.tokenizer, top_k, dtype, teacher.weights)
    batches = dataset.training(batch_size=experiment.batch_size, seed=experiment.seed)
    model, device = teacher.model, compute_device()
    cast_for_compute(model, getattr(torch, experiment.precision))
    model.to(device).eval()
    if kernels_of(experiment, device) == "fast":
        use_fast_kernels(model, device)
    with only_writer(folder):
        _write(distil.LogitWriter(folder, info), model, batches.batch, experiment)
    return summary(distil.LogitStore(folder))


@torch.no_grad()
def _write(
    writer: distil.LogitWriter,
    model: SwitchTransformer,
    batch_at: Callable[[int], Batch],
    experiment: Experiment,
) -> None:
    """All rows of the run, from the first that is missing."""
    size, steps = experiment.batch_size, experiment.num_steps
    first = writer.written // size
    for step in tracked(range(first, steps), "storing probabilities", steps - first):
        batch, skipped = batch_at(step), max(0, writer.written - step * size)
        batch = batch.to(model.embedding.weight.device)
        parts = batch.split(experiment.micro_batches)
        if skipped:  # a killed writer stopped within this batch: the rest of it at once
            parts = [batch.take(torch.arange(skipped, size))]
        for part in parts:
            with skip_losses(model):
                writer.add(part, model(**part.arguments()).logits)
    writer.flush()


def summary(store: distil.LogitStore) -> str:
    """What a store holds and its size on disk, in two lines."""
    info, targets = store.info, max(1, store.num_targets)
    return (
        f"{store.folder} holds the {info.top_k} likeliest of {info.vocab_size:,} ids for "
        f"{store.num_targets:,} targets in {store.num_rows:,} rows.\n"
        f"{store.num_bytes / 1e6:,.1f} MB: {store.num_bytes / targets:.1f} bytes per target "
        f"(all logits in float32 take {4 * info.vocab_size:,})."
    )
