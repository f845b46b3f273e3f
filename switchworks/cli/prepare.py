"""`switchworks prepare RECIPE`: tokenizer, token store and teacher's probabilities, in advance."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from switchworks.cli.parsing import check_needed, parse_experiment
from switchworks.config import ConfigError


@dataclass(frozen=True)
class PrepareFlags:
    """How a job array shares the work, and how much of a teacher's probabilities is stored."""

    init: Path | None = None
    """The model that training will start from, for recipes that take their tokenizer from it."""
    shard: str | None = None
    """I/N, for example 3/64: tokenise only this part. Parts count from 0."""
    top_k: int = 32
    """With --distil.store: the number of likeliest ids stored per target; the probability of all
    others is stored as one sum."""
    logits: Literal["float16", "float32"] = "float16"
    """With --distil.store: the dtype of the stored log-probabilities."""


def run(words: list[str]) -> int:
    """Prepare the data of a recipe, print a summary of it, and store the teacher's targets."""
    experiment, flags = parse_experiment("prepare", words, PrepareFlags)
    from switchworks.data import Mixture, coverage_table, mc4_table, open_dataset

    shard = None if flags.shard is None else parse_shard(flags.shard)
    stores_teacher = experiment.distil is not None and experiment.distil.store is not None
    _check_teacher_flags(flags, stores_teacher)
    dataset = open_dataset(experiment.data, vocab_size=experiment.model.vocab_size, shard=shard)
    if dataset.by_language and dataset.complete:
        print(coverage_table(dataset.coverage()), end="")
        print(mc4_table(dataset.parts))
    else:
        print(dataset)
    if (experiment.data.is_mixture or experiment.data.tasks) and dataset.complete:
        batches = dataset.training(batch_size=experiment.batch_size, seed=experiment.seed)
        assert isinstance(batches, Mixture)
        print(dataset.summary(batches, experiment.resolved("bfloat16").num_steps))
    if stores_teacher:
        from switchworks.training import precompute_teacher

        print(precompute_teacher(experiment, top_k=flags.top_k, dtype=flags.logits))
    return 0


def parse_shard(text: str) -> tuple[int, int]:
    """3/64 -> (3, 64). Raises ConfigError for anything but I/N with 0 <= I < N."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise ConfigError(
            f"--shard {text} is not I/N with 0 <= I < N. Example: --shard 3/64, counted from 0."
        )
    return int(number), int(count)


def _check_teacher_flags(flags: PrepareFlags, stores_teacher: bool) -> None:
    if stores_teacher and flags.shard is not None:
        raise ConfigError(
            f"--shard {flags.shard} is for the text. The teacher reads whole batches of it.\n"
            "  Prepare the text first, then the store of --distil.store without --shard."
        )
    for name in ("top_k", "logits"):
        check_needed(flags, name, "--distil.store", given=stores_teacher)
