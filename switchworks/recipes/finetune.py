"""Fine-tuning: a trained model of whatever shape on other text, with the paper's dropout."""

import math
from dataclasses import replace
from pathlib import Path

from switchworks.checkpoint import is_model, stored_config
from switchworks.data import DataConfig
from switchworks.optim import OptimConfig
from switchworks.recipes.quickstart import quickstart
from switchworks.training import BestConfig, Experiment, settings_in

ROWS = 64
"""Rows of a batch, or the next multiple of the model's routing groups."""


def finetune(init: Path | str | None = None) -> Experiment:
    """A trained model on your own text: --init MODEL --data.path TEXT. Not yet run at full length.

    Section 4.1: dropout 0.1, and 0.4 inside experts; the best of the validations becomes the model.
    The paper names no learning rate: T5's constant 1e-3, here after a warm-up. It ran 16,000 steps
    of 2^20 tokens and validated every 200. Model, tokenizer and row lengths are those of `init`, a
    run or model directory; without one those of `quickstart`.
    """
    model = quickstart().model if init is None else stored_config(init)
    routing = model.routing and replace(model.routing, expert_dropout=0.4)
    group = 1 if routing is None else routing.group_sequences
    return Experiment(
        name="finetune",
        steps=2000,
        batch_size=math.ceil(ROWS / group) * group,
        precision="auto",
        model=replace(model, dropout=0.1, routing=routing),
        data=_rows_of(init),
        optim=OptimConfig(lr=1e-3, schedule="constant", warmup_steps=100),
        best=BestConfig(patience=5),
        log_every=20,
        validate_every=100,
        validation_batches=16,
        checkpoint_every=500,
    )


def text_of(path: Path) -> DataConfig:
    """The text, and the rows, that the model in `path` was trained on; of a model that is in no run
    the rows of its kind."""
    run = settings_in(path)
    if run is not None:
        return run.data
    if is_model(path) and stored_config(path).decoder_only:
        return DataConfig(objective="causal", input_length=0, target_length=512)
    return DataConfig()


def _rows_of(init: Path | str | None) -> DataConfig:
    """Rows as `init` was trained on, read with its tokenizer, of any text."""
    if init is None:
        return quickstart().data
    theirs = text_of(Path(init))
    lengths = theirs.input_length, theirs.target_length
    if theirs.objective == "causal":  # of tasks it may have inputs, of text it has none
        lengths = 0, sum(lengths)
    return DataConfig(
        tokenizer=str(init),
        objective=theirs.objective,
        input_length=lengths[0],
        target_length=lengths[1],
        noise_density=theirs.noise_density,
        mean_span=theirs.mean_span,
        packing=theirs.packing,
    )
