"""The weights a run starts from (a checkpoint, another model, the teacher, initial values), and
those it ends with, as files that `switchworks.load` opens."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from switchworks import adapt, checkpoint, data, distil, parallel
from switchworks.checkpoint import Checkpoints, on_rank_zero, require_match
from switchworks.config import CheckpointError
from switchworks.model import SwitchTransformer
from switchworks.parallel import Ranks
from switchworks.training.experiment import Experiment
from switchworks.training.state import TrainState, build_state


def initial_state(
    experiment: Experiment,
    checkpoints: Checkpoints | None,
    init: Path | str | None,
    teacher: "distil.TeacherSource | None",
    dataset: "data.TextDataset",
    ranks: Ranks,
) -> TrainState:
    """The state a run starts from. In order of precedence: the newest of `checkpoints`, the weights
    of `init`, those of the teacher as far as they fit, initial weights."""
    newest = None if checkpoints is None else checkpoints.latest()
    inherits = newest is None and experiment.distil is not None and experiment.distil.initialise
    # On a mesh each rank initialises its shard, so that none has to hold a full model.
    sharded = ranks.mesh is not None and init is None and not inherits
    model = None if sharded else _full_model(experiment, init, dataset.tokenizer)
    if inherits:
        from switchworks.training.distillation import initialise_student

        assert model is not None
        assert teacher is not None
        initialise_student(model, teacher, experiment, dataset)
    empty = sharded and newest is not None
    source: Any = getattr(teacher, "model", teacher)  # a store of probabilities is no model
    state = build_state(experiment, model, source, ranks, empty=empty)
    if checkpoints is not None and newest is not None:
        contents = state.state_dict()
        about = checkpoints.load(newest, contents)
        state.restore(contents, about)
        print(f"resumed from step {state.step} ({newest})")
    return state


def _full_model(
    experiment: Experiment, init: Path | str | None, tokenizer: "data.Tokenizer"
) -> SwitchTransformer:
    fresh = SwitchTransformer(experiment.model, seed=experiment.seed)
    if init is None:
        return fresh
    model, trained_with = checkpoint.load(Path(init), to_float32=True)
    if trained_with is not None and trained_with.fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"{init} was trained with another tokenizer: its embeddings are of other tokens.\n"
            f"  Use the model's own: --data.tokenizer {init}."
        )
    if model.config.vocab_size != experiment.model.vocab_size:
        raise CheckpointError(
            f"{init} has a vocabulary of {model.config.vocab_size}, the tokenizer one of "
            f"{experiment.model.vocab_size}.\n"
            f"  Use the model's own tokenizer: --data.tokenizer {init}."
        )
    fresh.load_state_dict(model.state_dict())
    return fresh


def require_shape(experiment: Experiment, init: Path | str) -> None:
    """Raises CheckpointError if `init` holds no model, or one of another shape.

    Reads only its settings, so it can be called early; the vocabulary is compared later.
    """
    stored = checkpoint.stored_config(init)
    with torch.device("meta"):
        needed = SwitchTransformer(replace(experiment.model, vocab_size=stored.vocab_size))
        model = SwitchTransformer(stored)
    wanted, actual = (
        {name: tuple(weight.shape) for name, weight in each.named_parameters()}
        for each in (needed, model)
    )
    require_match(
        f"The weights in {init} do not fit this experiment's model.",
        wanted=wanted,
        actual=actual,
        fix="Give the experiment the model settings in that folder's config.toml.",
    )


def export(state: TrainState, directory: Path, tokenizer: "data.Tokenizer") -> None:
    """Writes the float32 weights and the tokenizer to model/ of `directory`.

    LoRA adapters are merged in, and also written to adapters/ by themselves; for that each rank
    gathers the full model, as it did when the adapters were made.
    """
    weights, lora = state.updater.masters.float_state(), state.experiment.lora
    if lora is not None and state.adapted is not None:
        also = state.adapted.also
        weights = {name: parallel.gather_full(weight) for name, weight in weights.items()}
        on_rank_zero(lambda: adapt.save_adapters(directory / "adapters", weights, lora, also))
        weights = adapt.merged(weights, lora)
    with torch.device("meta"):
        model = SwitchTransformer(state.experiment.model)
    model.load_state_dict(weights, assign=True)
    checkpoint.save(model, directory / "model", tokenizer=tokenizer)
