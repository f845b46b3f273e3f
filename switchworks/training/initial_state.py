"""Where a run starts: a checkpoint, another model's weights or its teacher's, or first values."""

from dataclasses import replace
from pathlib import Path

import torch

from switchworks.batch import Batch
from switchworks.checkpoint import Checkpoints, load, require_match, stored_config
from switchworks.config import CheckpointError
from switchworks.data import TextDataset, Tokenizer
from switchworks.distil import (
    DistilConfig,
    LogitStore,
    Teacher,
    dense_teacher,
    initialise_from_teacher,
    open_teacher,
)
from switchworks.model import SwitchTransformer
from switchworks.parallel import Ranks
from switchworks.training.experiment import Experiment
from switchworks.training.state import TrainState, build_state

COUNTED, TOGETHER = 512, 16
"""Rows by whose tokens the teacher's experts are weighed, and how many of them at once."""


def initial_state(
    experiment: Experiment,
    checkpoints: Checkpoints | None,
    init: Path | str | None,
    taught_by: Teacher | LogitStore | None,
    corpora: TextDataset,
    ranks: Ranks,
) -> TrainState:
    """Where the run starts, in order of precedence: checkpoint, `init`, the teacher's weights as
    far as they fit, first values."""
    newest = None if checkpoints is None else checkpoints.latest()
    teacher = taught_by if isinstance(taught_by, Teacher) else None
    logits = taught_by if isinstance(taught_by, LogitStore) else None
    inherits = newest is None and experiment.distil is not None and experiment.distil.initialise
    # On a mesh each rank begins with its part, and none has to hold a whole model.
    in_parts = ranks.mesh is not None and init is None and not inherits
    model = None if in_parts else _first_model(experiment, init, corpora.tokenizer)
    if inherits:
        source = teacher or open_teacher(experiment)
        assert model is not None
        assert source is not None
        assert experiment.distil is not None
        seen = [] if experiment.distil.ffn == "fresh" else rows_to_count(corpora, experiment.seed)
        _inherit(model, source, experiment.distil, seen)
    empty = in_parts and newest is not None
    state = build_state(experiment, model, teacher and teacher.model, ranks, logits, empty=empty)
    if checkpoints is not None and newest is not None:
        contents = state.state_dict()
        about = checkpoints.load(newest, contents)
        state.restore(contents, about)
        print(f"resumed from step {state.step} ({newest})")
    return state


def rows_to_count(corpora: TextDataset, seed: int) -> list[Batch]:
    """The first COUNTED rows of the run, in small batches: by their tokens experts are weighed.

    All of the run's, not one rank's: on a mesh every rank has to begin with the same weights.
    """
    pipeline = corpora.training(batch_size=TOGETHER, seed=seed)
    return [pipeline.batch(step) for step in range(COUNTED // TOGETHER)]


def _inherit(
    student: SwitchTransformer, teacher: Teacher, distil: DistilConfig, seen: list[Batch]
) -> None:
    """Copy what fits of the teacher and say how much that is."""
    source = teacher.model
    if distil.ffn != "fresh":
        source = dense_teacher(source, seen, distil.ffn)
    copied, fresh = initialise_from_teacher(student, source)
    print(f"student: {len(copied)} of {len(copied) + len(fresh)} tensors from {teacher.path}")
    if fresh:
        print(f"  fresh: {', '.join(fresh[:6])}{', ...' if len(fresh) > 6 else ''}")


def _first_model(
    experiment: Experiment, init: Path | str | None, tokenizer: Tokenizer
) -> SwitchTransformer:
    if init is None:
        return SwitchTransformer(experiment.model, seed=experiment.seed)
    model, own = load(Path(init), to_float32=True)
    if own is not None and own.fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"{init} was trained with another tokenizer: its embeddings stand for other pieces.\n"
            f"  Use the model's own: --data.tokenizer {init}."
        )
    if model.config.vocab_size != experiment.model.vocab_size:
        raise CheckpointError(
            f"{init} has a vocabulary of {model.config.vocab_size}, the tokenizer one of "
            f"{experiment.model.vocab_size}.\n"
            f"  Use the model's own tokenizer: --data.tokenizer {init}."
        )
    fresh = SwitchTransformer(experiment.model, seed=experiment.seed)
    _require_fit(init, fresh, model)
    fresh.load_state_dict(model.state_dict())
    return fresh


def require_shape(experiment: Experiment, init: Path | str) -> None:
    """Raises CheckpointError if there is no model in `init`, or none of this experiment's shape.

    Reads its settings alone; whether the vocabulary fits is known once there is a tokenizer.
    """
    stored = stored_config(init)
    with torch.device("meta"):
        wanted = SwitchTransformer(replace(experiment.model, vocab_size=stored.vocab_size))
        found = SwitchTransformer(stored)
    _require_fit(init, wanted, found)


def _require_fit(init: Path | str, wanted: SwitchTransformer, found: SwitchTransformer) -> None:
    require_match(
        f"The weights in {init} do not fit this experiment's model.",
        wanted={name: tuple(p.shape) for name, p in wanted.named_parameters()},
        found={name: tuple(p.shape) for name, p in found.named_parameters()},
        fix="Give the experiment the model settings in that folder's config.toml.",
    )
