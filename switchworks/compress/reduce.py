"""`switchworks convert --prune K` and `--merge K`: from a directory to a directory."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from switchworks.batch import Batch
from switchworks.checkpoint import open_model, save
from switchworks.compress.fewer_experts import (
    By,
    Fewer,
    check_fewer,
    dense_equivalent,
    merge_experts,
    prune_experts,
)
from switchworks.config import ConfigError
from switchworks.data import DataConfig, find_tasks, open_dataset, text_for
from switchworks.model import ModelConfig

ROWS = 16
"""Rows in a batch of the text by which experts are counted."""


def reduce_directory(
    source: Path | str,
    destination: Path | str,
    keep: int,
    *,
    method: Literal["prune", "merge"],
    by: By = "usage",
    text: str | None = None,
    only: tuple[str, ...] = (),
    batches: int = 32,
) -> str:
    """`destination` holds the model in `source` with `keep` experts a layer; says which remained.

    One expert makes a dense model.
    `text` is a file, folder or glob; None takes the text that a run directory was trained on, or
    `only` some of its languages, corpora or tasks; of a run without any, tasks by their names.
    `batches` of 16 rows are read from its training part. Raises ConfigError if there is no text,
    and what `prune_experts` and `merge_experts` raise.
    """
    source = Path(source)
    if batches < 1:
        raise ConfigError(f"--batches {batches} would read no text. Use at least 1.")
    model, tokenizer = open_model(source)
    check_fewer(model.config, keep)  # before any text is read, which may take long
    if tokenizer is None:
        raise ConfigError(
            f"{source} holds no tokenizer, so no text can be read for it.\n"
            "  Put the model's spiece.model beside its weights."
        )
    data = text_to_count(source, model.config, text, only)
    corpora = open_dataset(data, vocab_size=model.config.vocab_size)
    pipeline = corpora.training(batch_size=ROWS, seed=0)
    seen = [pipeline.batch(step) for step in range(batches)]
    reduce = prune_experts if method == "prune" else merge_experts
    fewer = reduce(model, seen, keep, by=by)
    result = dense_equivalent(fewer.model) if keep == 1 else fewer.model
    save(result, destination, tokenizer)
    what, flags = f"{keep} experts a layer", f"RECIPE --init {destination}"
    flags += f" --model.routing.experts {keep}"
    if keep == 1:
        what, flags = "a dense FFN for each layer of experts", f"RECIPE_dense --init {destination}"
    return (
        f"{as_text(fewer, seen, data)}\n{destination} holds the model with {what}. To recover:\n"
        f"  switchworks train {flags}"
    )


def text_to_count(
    source: Path, model: ModelConfig, text: str | None, only: tuple[str, ...]
) -> DataConfig:
    """The text of the run in `source`, or `text` in its place, or `only` a part of it.

    Raises ConfigError if both are asked for, and what `text_for` raises.
    """
    if text is not None and only:
        raise ConfigError(f"--text {text} and --only {' '.join(only)}: count on one of them.")
    data = text_for(source, decoder_only=model.decoder_only, text=text)
    return _part_of(data, only) if only else data


def _part_of(data: DataConfig, names: tuple[str, ...]) -> DataConfig:
    """Of what a run read these languages, corpora or tasks alone; of plain text, tasks by name."""
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
    find_tasks(names)  # or says which there are
    room = data.input_length or data.target_length  # causal text has none for inputs
    return replace(data, tasks=names, input_length=room, task_packing="auto")


def as_text(fewer: Fewer, seen: list[Batch], data: DataConfig) -> str:
    """A line for each layer: what share of the tokens its experts had, and which they are."""
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
