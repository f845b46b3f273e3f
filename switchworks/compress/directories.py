"""From a directory to a directory: `switchworks convert --prune`, `--merge` and `--quantise`."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

from switchworks import checkpoint
from switchworks.batch import Batch
from switchworks.compress.fewer import (
    By,
    Fewer,
    Method,
    check_fewer,
    dense_equivalent,
    reduce_experts,
)
from switchworks.config import ConfigError
from switchworks.data import DataConfig, find_tasks, open_dataset, text_for
from switchworks.model import ModelConfig
from switchworks.quantise import QuantiseConfig, Scheme, TensorBits, quantise, tensors_of

ROWS = 16
"""Rows in a batch of the text that usage is measured on."""


def reduce_directory(
    source: Path | str,
    destination: Path | str,
    keep: int,
    *,
    method: Method,
    by: By = "usage",
    text: str | None = None,
    only: tuple[str, ...] = (),
    batches: int = 32,
) -> str:
    """Write the model in `source` with `keep` experts a layer to `destination`; 1 makes it dense.

    Experts are counted on `batches` batches of 16 rows of the training part of a text: `text` is a
    file, folder or glob; None takes what the run in `source` was trained on, or of that the
    languages, corpora or tasks `only`; for a run on plain text these are tasks by name. Returns a
    description of which experts remain. Raises ConfigError if there is no text, and what
    `reduce_experts` raises.
    """
    source = Path(source)
    if batches < 1:
        raise ConfigError(f"--batches {batches} would read no text. Use at least 1.")
    model, tokenizer = checkpoint.open_model(source)
    check_fewer(model.config, keep)  # before any text is read, which may take long
    checkpoint.require_tokenizer(source, tokenizer)
    data = text_to_count(source, model.config, text, only)
    dataset = open_dataset(data, vocab_size=model.config.vocab_size)
    pipeline = dataset.training(batch_size=ROWS, seed=0)
    seen = [pipeline.batch(step) for step in range(batches)]
    fewer = reduce_experts(model, seen, keep, method=method, by=by)
    result = dense_equivalent(fewer.model) if keep == 1 else fewer.model
    checkpoint.save(result, destination, tokenizer)
    layers, recipe = f"{keep} experts a layer", "RECIPE"
    flags = f" --model.routing.experts {keep}"
    if keep == 1:
        layers, recipe, flags = "a dense FFN for each layer of experts", "RECIPE_dense", ""
    table = fewer_table(fewer, seen, data)
    return (
        f"{table}\n{destination} holds the model with {layers}. To recover:\n"
        f"  switchworks train {recipe} --init {destination}{flags}"
    )


def text_to_count(
    source: Path, model: ModelConfig, text: str | None, only: tuple[str, ...]
) -> DataConfig:
    """The text of the run in `source`, or `text` in its place, or `only` a part of it. Raises
    ConfigError if both are asked for, and what `text_for` raises."""
    if text is not None and only:
        raise ConfigError(
            f"--text {text} and --only {' '.join(only)} are both to count on.\n  Give one of them."
        )
    data = text_for(source, decoder_only=model.decoder_only, text=text)
    return _part_of(data, only) if only else data


def _part_of(data: DataConfig, names: tuple[str, ...]) -> DataConfig:
    """`data` with the languages, corpora or tasks `names` alone; of plain text, tasks by name."""
    if data.mixture or data.tasks:
        entries = {entry.partition("=")[0]: entry for entry in data.mixture or data.tasks}
        if missing := [name for name in names if name not in entries]:
            raise ConfigError(
                f"--only {' '.join(missing)}: the run read nothing of that name.\n"
                f"  It read {', '.join(entries)}."
            )
        kept = tuple(entries[name] for name in names)
        return replace(data, mixture=kept) if data.mixture else replace(data, tasks=kept)
    if data.is_mixture:
        return replace(data, languages=names)
    find_tasks(names)  # raises for an unknown name
    length = data.input_length or data.target_length  # that of causal text is 0
    return replace(data, tasks=names, input_length=length, task_packing="auto")


def fewer_table(fewer: Fewer, seen: list[Batch], data: DataConfig) -> str:
    """A line for each layer: its experts, and the share of the tokens that had chosen them."""
    tokens = sum(batch.num_tokens for batch in seen)
    lines = [f"experts by their use on {tokens:,} tokens of {data.named}"]
    for name, groups in fewer.groups.items():
        share = sum(group.share for group in groups)
        experts = " ".join("+".join(map(str, group.members)) for group in groups)
        scales = fewer.scales[name]
        lines.append(
            f"  {name:<20} {share:4.0%} of the tokens, output x {float(scales.min()):.2f} to "
            f"{float(scales.max()):.2f}, experts {experts}"
        )
        if unused := [group.members[0] for group in groups if not group.share]:
            lines.append(
                f"  {'':<20} no token wants {len(unused)} of these ({' '.join(map(str, unused))}): "
                "keep fewer, or give more --text or --batches"
            )
    return "\n".join(lines)


def quantise_directory(
    source: Path | str, destination: Path | str, scheme: Scheme, *, group: int = 32
) -> str:
    """Writes the model in `source` in 8 or 4 bits; returns a table of its tensors with their bits.

    Tensors that are not quantised are in float32, also those of a bfloat16 model. `group` is for
    int4. Raises ConfigError if the model is quantised already, or for a group with another scheme.
    """
    source = Path(source)
    if (before := checkpoint.stored_quantisation(source)) is not None:
        raise ConfigError(
            f"The model in {source} is quantised already, to {before.scheme}.\n"
            "  Quantise the one it was made from."
        )
    if scheme != "int4" and group != 32:
        raise ConfigError(
            f"--group {group} is for int4; {scheme} has a scale for each output channel.\n"
            "  Leave it out."
        )
    model, tokenizer = checkpoint.open_model(source)
    fresh = sum(tensor.bytes for tensor in tensors_of(model))
    model = quantise(model.float(), QuantiseConfig.from_scheme(scheme, group))
    checkpoint.save(model, destination, tokenizer)
    tensors = tensors_of(model)
    total = sum(tensor.bytes for tensor in tensors)
    sizes = f"{total / 1e6:,.2f} MB, before {fresh / 1e6:,.2f} MB"
    return f"{tensors_table(tensors)}\n{destination} holds the model in {scheme}: {sizes}."


def tensors_table(tensors: Sequence[TensorBits]) -> str:
    """A line for tensors whose names differ in numbers alone: bits, bits with scales, megabytes."""
    lines = [f"{'bits':>4} {'with scales':>11} {'MB':>9}  tensors"]
    for names, bits, with_scales, size in grouped(tensors):
        lines.append(f"{bits:>4} {with_scales:>11.2f} {size / 1e6:>9.3f}  {names}")
    return "\n".join(lines)


def grouped(tensors: Sequence[TensorBits]) -> list[tuple[str, int, float, int]]:
    """(names, bits, bits with scales, bytes) of tensors of equal shape and bits whose names differ
    in numbers alone."""
    alike: dict[tuple[str, tuple[int, ...], int], list[TensorBits]] = {}
    for tensor in tensors:
        stem = "".join("#" if letter.isdigit() else letter for letter in tensor.name)
        alike.setdefault((stem, tensor.shape, tensor.bits), []).append(tensor)
    rows = []
    for (_, shape, bits), same in alike.items():
        (names,) = checkpoint.merged_names([tensor.name for tensor in same])
        size = sum(tensor.bytes for tensor in same)
        with_scales = 8 * size / (len(same) * prod(shape))
        rows.append((f"{names} {list(shape)}", bits, with_scales, size))
    return rows
